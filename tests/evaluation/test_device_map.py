"""Models whose parts lie in several places give the same numbers, to the last bit, as in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from torch import Tensor

from lolcats import LolcatsError, convert, linearize, load_teacher
from lolcats.config import FinetuneConfig, RunConfig, TransferConfig
from lolcats.evaluation.compare import load_variants
from lolcats.evaluation.harness.model import ResumableLM
from lolcats.evaluation.perplexity import measure
from lolcats.evaluation.recall import RecallSettings, recall
from lolcats.evaluation.store import AnswerStore
from lolcats.evaluation.variants import identities
from lolcats.models.device_map import DeviceMap, read_device_map
from lolcats.models.generation import write_tokens
from lolcats.placing import main_device
from lolcats.runs.folder import RunFolder
from lolcats.training import FinetuneStage, TransferStage

MAP: DeviceMap = {
    "model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
    "model.norm": "cpu", "lm_head": "disk",
}  # fmt: skip
KINDS = [[], ["linearization.mixer=blend", "linearization.bits=8"]]
QUICK = ["transfer.tokens=192", "finetune.tokens=192", "evaluation.controls=[trained_window]"]

pytestmark = [pytest.mark.usefixtures("no_gradients"), pytest.mark.slow]


@pytest.fixture(scope="module")
def made() -> dict[str, RunFolder]:
    return {}


@pytest.fixture(params=KINDS, ids=str)
def run(request: Any, made: dict[str, RunFolder], make_config: Callable[..., RunConfig]) -> RunFolder:
    key = str(request.param)
    if key not in made:
        with torch.enable_grad():
            made[key] = linearize(make_config(*QUICK, *request.param))
    return made[key]


def variants(run: RunFolder, device_map: DeviceMap | None) -> Any:
    options: dict[str, Any] = {"teacher": run.config().model, "device": "cpu", "dtype": "float32"}
    return load_variants(run.model, **options, device_map=device_map)


def test_all_variants_score_the_same(run: RunFolder) -> None:
    whole, spread = variants(run, None), variants(run, MAP)
    segments = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    assert {*whole.variants} - {*spread.variants} == {"trained_window"}, "its weights cannot be exchanged"
    del whole.variants["trained_window"]
    left, right = (measure(v.variants, segments, teacher=v.teacher) for v in (whole, spread))
    assert left == right and len(left) > 6
    model = spread.variants["student"].model
    assert model.device.type == "meta" and main_device(model).type == "cpu"
    kept = [name for name, p in model.named_parameters() if p.is_meta]
    assert "model.layers.0.self_attn.inner.q_proj.weight" in kept and not [name for name in kept if ".mixer." in name]
    assert spread.memory == whole.memory
    assert identities(spread.variants, spread.tokenizer) == identities(whole.variants, whole.tokenizer), (
        "answers that are kept are of the weights wherever they lie"
    )


def test_texts_are_the_same(run: RunFolder) -> None:
    whole, spread = variants(run, None), variants(run, MAP)
    ids = torch.randint(3, 300, (1, 30), generator=torch.Generator().manual_seed(1))

    def text(loaded: Any, name: str) -> Tensor:
        variant = loaded.variants[name]
        with variant.mode():
            return write_tokens(variant.model, loaded.tokenizer, ids, max_new_tokens=12)

    for name in ("student", "teacher", "equal_window"):
        assert torch.equal(text(whole, name), text(spread, name))
    settings = RecallSettings(["passkey"], [240], 2, 1, 0, "python-docs", False)
    names = ("student", "teacher")
    left, right = (
        recall({n: v.variants[n] for n in names}, v.tokenizer, settings, batch_size=2) for v in (whole, spread)
    )
    assert left == right


def test_the_harness_gives_the_same_answers(run: RunFolder) -> None:
    asked = [Instance("loglikelihood", {}, ("the river", " runs through"), 0),
             Instance("loglikelihood", {}, ("a miller", " lived"), 1)]  # fmt: skip
    written = [Instance("generate_until", {}, ("the river", {"until": ["<end>"], "max_gen_toks": 4}), 0)]
    found = []
    for loaded in (variants(run, None), variants(run, MAP)):
        how = {"batch_size": 2, "store": AnswerStore(), "identity": ""}
        harness: Any = ResumableLM(loaded.variants["student"].model, loaded.tokenizer, **how)
        found.append((harness.loglikelihood(asked), harness.generate_until(written)))
    assert found[0] == found[1]


def test_it_is_not_trained(run: RunFolder) -> None:
    model = variants(run, MAP).variants["student"].model
    with pytest.raises(LolcatsError, match=r"loaded with a device_map, which is for running it"):
        TransferStage(model, TransferConfig())
    with pytest.raises(LolcatsError, match=r"loaded with a device_map, which is for running it"):
        FinetuneStage(model, FinetuneConfig())
    with pytest.raises(LolcatsError, match=r"load it on one device|load the whole model on one device"):
        convert(load_teacher(run.config().model, device_map=MAP)[0])


def test_what_cannot_be(model_folder: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(LolcatsError, match=match):
            load_teacher(options.pop("source", model_folder), **options)

    refused(r"demo is a GGUF file, which is unpacked in one place", source="demo", device_map="auto")
    refused(r"quantized weights lie in one place", device_map="auto", quantization="8bit")
    refused(r"places 'model.layers.7', which .* does not have; it has parts such as model, ",
            device_map={"model.layers.7": "cpu"})  # fmt: skip
    refused(r"leaves out lm_head.weight of ", device_map={"model": "disk"})
    shutil.copytree(model_folder, tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    refused(r"hold NaN or infinity \(model.layers.0.mlp.up_proj.weight\)", source=tmp_path / "damaged", device_map=MAP)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"no file .*map.json; expected auto, balanced or FILE.json"),
        ("[", r"is not JSON"),
        ("{}", r"places no part of a model"),
        ('{"model": "tpu"}', r"model: 'tpu' is no place; expected cpu, disk or cuda:N"),
        ('{"model": 0}', r"model: 0 is no place"),
        ('{"model": "cuda:77"}', r"device 'cuda:77' was asked for, but this machine has none"),
    ],
)
def test_files_that_are_no_map(tmp_path: Path, content: str | None, match: str) -> None:
    if content is not None:
        (tmp_path / "map.json").write_text(content)
    with pytest.raises(LolcatsError, match=match):
        read_device_map(str(tmp_path / "map.json"))


def test_maps_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    assert read_device_map(str(tmp_path / "map.json")) == MAP
    assert read_device_map("balanced") == "balanced"
    with pytest.raises(LolcatsError, match=r"unknown device map 'fast'; expected auto, balanced or FILE.json"):
        read_device_map("fast")
