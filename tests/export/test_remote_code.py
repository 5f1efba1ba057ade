"""Loading without the package, in a process where it cannot be imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from lolcats import LinearizationConfig, LolcatsError, RunConfig, convert, export_model
from lolcats.export import remote_code
from lolcats.runs.artefact import RECIPE_FILE, save_artefact
from lolcats.runs.results import Results
from tiny import perturb

from .conftest import Runs

READER = """
import sys
sys.modules["lolcats"] = sys.modules["pydantic"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
def answer(model):
    text = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return {"logits": model(input_ids=ids).logits, "text": text, "name": type(model).__name__}

ids, out, *folders = sys.argv[1:]
ids, answers = torch.load(ids), []
for folder in folders:
    model = load(folder)
    with torch.no_grad():
        first = answer(model)
        model.save_pretrained(folder + "-again")
        second = answer(load(folder + "-again"))
        third = answer(model)  # two copies of the code in one process
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answers.append([first, second, third, tokenizer("the river")["input_ids"]])
try:
    import lolcats
except ImportError:
    torch.save(answers, out)
"""


def read_elsewhere(folders: list[Path], ids: Tensor, place: Path) -> list[list[Any]]:
    """Logits, greedy text and class name from a process without the package; the same after save_pretrained there."""
    torch.save(ids, place / "ids.pt")
    (place / "reader.py").write_text(READER)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("HF_")}
    environment |= {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    words = [place / "ids.pt", place / "answers.pt", *folders]
    done = subprocess.run(
        [sys.executable, "-I", str(place / "reader.py"), *map(str, words)],
        env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(place / "answers.pt")


def check_same(model: Any, found: list[Any], ids: Tensor) -> None:
    """What another process found is what this one computes."""
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        text = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for answer in found[:3]:
        assert answer["name"] == type(model).__name__
        torch.testing.assert_close(answer["logits"], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(answer["text"], text)


def gemma() -> PreTrainedModel:
    """Local layers between global ones, which alone are linearized."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def gpt2() -> PreTrainedModel:
    """Learned positions, Conv1D layers, biases."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
                                      eos_token_id=0))  # fmt: skip


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"gemma": gemma, "gpt2": gpt2}
RUNS = {
    "plain": [],
    "kept": [
        "linearization.mixer=blend",
        "linearization.kept.pairs=5",
        "linearization.far=gated_delta",
        "linearization.bits=4",
    ],
    "split": [
        "linearization.mixer=blend",
        "linearization.far=none",
        "linearization.kept.pairs=4",
        "linearization.budget=heads",
    ],
    "gate": ["linearization.decay=gate", "linearization.state_heads=kv", "finetune.train_feature_maps=true"],
}


@pytest.fixture(scope="module")
def elsewhere(
    runs: Runs, ids: Tensor, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, list[Any]]]:
    """Of runs and of models of other families: the model as it is here, and what one process found of all exports."""
    place, models = tmp_path_factory.mktemp("elsewhere"), dict[str, Any]()
    for name, kind in RUNS.items():
        models[name] = AutoModelForCausalLM.from_pretrained(runs(*kind).model).eval()
    for name, build in FAMILIES.items():
        torch.manual_seed(0)
        models[name] = perturb(convert(build().eval(), LinearizationConfig(window=4, sinks=1)))
        save_artefact(place / name, models[name], tiny_tokenizer, RunConfig(), Results())
    sources = {name: runs(*RUNS[name]).path if name in RUNS else place / name for name in models}
    folders = [export_model(sources[name], place / f"my-{name}.v1", "remote-code").folder for name in models]
    return dict(zip(models, zip(models.values(), read_elsewhere(folders, ids, place), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, *FAMILIES])
def test_a_model_is_loaded_without_the_package(
    elsewhere: dict[str, tuple[Any, list[Any]]], ids: Tensor, name: str
) -> None:
    model, found = elsewhere[name]
    check_same(model, found, ids)
    assert found[3]


@pytest.mark.slow
def test_with_the_package_its_own_code_is_used(runs: Runs, ids: Tensor, tmp_path: Path) -> None:
    """Trusted or not; nothing of the folder is executed."""
    folder = export_model(runs().path, tmp_path / "out", "remote-code").folder
    (folder / "modeling_lolcats.py").write_text("raise RuntimeError('executed')\n")
    expected = AutoModelForCausalLM.from_pretrained(runs().model)
    for trust in (None, True, False):
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert type(loaded) is type(expected)
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.slow
def test_the_code_is_the_packages_own() -> None:
    """Every file but three written ones is a module of the package, with nothing changed but imports and two lines."""
    files = remote_code.collect_sources()
    assert {
        "lolcats_modeling_hf",
        "lolcats_modeling_attention",
        "lolcats_ops_hybrid_api",
        "lolcats_ops_hybrid_kernels_attention",
        "lolcats_ops_hybrid_kernels_decode",
        "lolcats_mixers_feature_maps",
    } <= set(files)
    source = Path(remote_code.__file__).parents[1]
    different = []
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {n.split(".")[0] for n in names} & {"lolcats", "pydantic", "yaml"}, name
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert node.module in files, (name, node.module)
        if name in ("lolcats_config", "lolcats_mixers_registry"):
            continue
        parts = name.split("_", 1)[1]
        own = next(p for p in source.rglob("*.py") if _flat(p.relative_to(source)) == parts).read_text()
        old, new = own.splitlines(), text.splitlines()
        tried = {"try:", "except ImportError:", "    raise"} | {
            f"    {line}" for line in old if "import triton" in line
        }
        different += [line for line in set(new) - set(old) - tried if not line.lstrip().startswith("from .")]
        different += [
            line for line in set(old) - set(new) if not line.lstrip().startswith(("from lolcats", "import triton"))
        ]
    assert sorted(line[:16] for line in different) == ["AutoConfig.regis", 'NAME = "lolcats"', "NAME = __name__"]


@pytest.mark.slow
def test_every_module_is_found_by_transformers_and_asks_for_no_other_package(tmp_path: Path) -> None:
    """transformers copies what it finds to be imported relatively, and wants every package imported outside `try`."""
    files = remote_code.collect_sources()
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        wanted = set(get_imports(tmp_path / f"{name}.py")) - set(sys.stdlib_module_names)
        assert wanted <= {"numpy", "torch", "transformers"}, (name, wanted)  # numpy: transformers needs it too
    start = tmp_path / "lolcats_modeling_hf.py"
    assert {Path(file).stem for file in get_relative_import_files(start)} | {start.stem} == set(files)


@pytest.mark.parametrize(
    "line",
    [
        "import lolcats.ops",
        "from .ops import hybrid",
        "from lolcats.config import RunConfig",
        "module = importlib.import_module('lolcats.ops.maps')",
        "module = importlib.import_module(f'lolcats.ops.{name}')",
    ],
)
def test_imports_that_could_not_be_followed_are_our_own_bug(line: str) -> None:
    remote_code.check_imports("module", "from lolcats.ops.maps import MapWeights\n")
    with pytest.raises(AssertionError, match="module"):
        remote_code.check_imports("module", f"{line}\n")


def _flat(path: Path) -> str:
    parts = [*path.parts[:-1], path.stem] if path.stem != "__init__" else list(path.parts[:-1])
    return "_".join(parts)


def test_the_settings_have_the_packages_fields_and_defaults() -> None:
    from lolcats.config import HybridConfig

    space: dict[str, Any] = {"__name__": "settings"}
    exec(compile(remote_code.settings_source("hybrid"), "settings", "exec", dont_inherit=True), space)
    made = space["LinearizationConfig"]
    assert made().model_dump() == HybridConfig().model_dump(mode="json")
    chosen = HybridConfig(window=7, layers=[0, 1], sinks=2)
    assert made(**chosen.model_dump(mode="json")).model_dump() == chosen.model_dump(mode="json")


def test_no_text_of_a_config_becomes_code(runs: Runs, tmp_path: Path) -> None:
    folder = export_model(runs().path, tmp_path / "a").folder
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["X = print('executed')  #"]}
    (folder / "config.json").write_text(json.dumps(config))
    out = export_model(folder, tmp_path / "b", "remote-code").folder
    assert "executed" not in (out / "modeling_lolcats.py").read_text()
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == (
        "modeling_lolcats.LinearizedLlamaForCausalLM"
    )


def test_an_unknown_family_is_refused(runs: Runs, tmp_path: Path) -> None:
    folder = export_model(runs().path, tmp_path / "a").folder
    config = json.loads((folder / "config.json").read_text()) | {"base_model_type": "nothing"}
    (folder / "config.json").write_text(json.dumps(config))
    assert (folder / RECIPE_FILE).is_file()
    with pytest.raises(LolcatsError, match=r"'nothing'"):
        export_model(folder, tmp_path / "b", "remote-code")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_code_does_not_go_into_other_formats(runs: Runs, tmp_path: Path) -> None:
    code = export_model(runs().path, tmp_path / "code", "remote-code").folder
    assert "auto_map" in json.loads((code / "config.json").read_text())
    plain = export_model(code, tmp_path / "plain").folder
    assert not list(plain.glob("*.py"))
    assert "auto_map" not in json.loads((plain / "config.json").read_text())
    assert not hasattr(AutoConfig.from_pretrained(plain), "auto_map")
