"""Stage 1 block by block: what it trains is what training all layers together gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from killing import Killed
from lolcats import LolcatsError, RunConfig, linearize
from lolcats.files import hold
from lolcats.models.block import Block, Part
from lolcats.runs.blocks import run_blocks
from lolcats.runs.blocks.plan import Plan, hidden_bytes
from lolcats.runs.folder import RunFolder
from lolcats.training import Reporter
from lolcats.training.checkpoint import load_tensors, read_metadata

Make = Callable[..., RunConfig]
UNCLIPPED = ("transfer.clip=1e30",)
LAYERS = {
    "hybrid": ("linearization.start=paper",),
    "first block only passes on": ("linearization.start=matched", "linearization.layers=[2,3]", "dtype=bfloat16"),
    "first block has nothing to learn": ("linearization.mixer=blend", "linearization.far=none",
                                         "linearization.kept.pairs=5", "linearization.kept.score=learned",
                                         "linearization.budget=layers",
                                         "linearization.split=[[6,0],[6,0],[6,5],[6,5]]"),
    "blend": ("linearization.mixer=blend", "linearization.kept.pairs=5", "linearization.budget=heads",
              "linearization.kept.score=learned"),
    "documents": ("data.packing=documents", "transfer.micro_batch_size=2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of four layers, in several shards."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=4, head_dim=6,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    tiny_tokenizer.save_pretrained(folder)
    return folder


def stage_1(folder: RunFolder, name: str = "last") -> dict[str, Tensor]:
    """Trained parameters and what the optimiser knows of them."""
    tensors, _ = load_tensors(folder.checkpoints("transfer") / f"{name}.safetensors")
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("random:")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.fixture
def make(make_config: Make, teacher: Path) -> Make:
    common = (f"model={teacher}", "transfer.validate_every=3", "evaluation.controls=[]")
    return lambda *changes: make_config(*common, *UNCLIPPED, *changes)


@pytest.fixture
def joint(make: Make) -> Callable[..., RunFolder]:
    """All layers trained together."""
    return lambda *changes: linearize(make("name=joint", *changes), until="transfer")


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metadata(folder: RunFolder) -> dict[str, Any]:
    return read_metadata(folder.checkpoints("transfer") / "last.safetensors")


@pytest.mark.parametrize("layer", [pytest.param(n, marks=[pytest.mark.slow] * (n == "hybrid")) for n in LAYERS])
def test_blocks_train_what_all_layers_train_together(make: Make, joint: Callable[..., RunFolder], layer: str) -> None:
    expected = joint(*LAYERS[layer])
    for size in (1, 2, 4) if layer == "blend" else (2,):
        folder = run_blocks(make(f"name=blocks{size}", f"transfer.blocks.size={size}", *LAYERS[layer]))
        for name in ("last", "best"):
            assert_same(stage_1(folder, name), stage_1(expected, name))
        assert [metadata(folder)[key] == metadata(expected)[key] for key in ("weights", "data", "step")] == [True] * 3
        assert folder.results().split == expected.results().split
        assert not list((folder.path / "hidden").rglob("*.safetensors"))
        if layer != "first block has nothing to learn":
            assert_same_numbers(folder, expected)


def assert_same_numbers(folder: RunFolder, expected: RunFolder) -> None:
    """What is said of the stage: means over layers, added up in another order."""
    for name, value in metadata(expected)["best"].items():
        assert metadata(folder)["best"][name] == pytest.approx(value, rel=1e-4), name
    lines, wanted = (read_lines(f.metrics_file) for f in (folder, expected))
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        for name in line.keys() - {"stage", "tokens_per_second"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.slow
def test_a_run_by_blocks_goes_on_as_any_other(make: Make, joint: Callable[..., RunFolder]) -> None:
    expected = joint()
    folder = linearize(make("name=whole", "transfer.blocks.size=2"), until="transfer")
    assert_same(stage_1(folder), stage_1(expected))
    assert folder.results().perplexity == expected.results().perplexity
    folder, expected = (linearize(f.config(), resume=True, until="finetune") for f in (folder, expected))
    files = [load_tensors(f.checkpoints("finetune") / "last.safetensors")[0] for f in (folder, expected)]
    assert_same(*files)


@pytest.mark.slow
def test_clipping_alone_tells_blocks_from_all_layers(make: Make, joint: Callable[..., RunFolder]) -> None:
    clip = "transfer.clip=1.0"
    found, expected = stage_1(run_blocks(make("transfer.blocks.size=1", clip))), stage_1(joint(clip))
    distance = {name: float((found[name] - tensor).abs().max()) for name, tensor in expected.items()}
    assert 1e-6 < max(value for name, value in distance.items() if name.startswith("parameter:")) < 0.05


@pytest.mark.parametrize("hidden", ["store", pytest.param("recompute", marks=pytest.mark.slow)])
def test_a_killed_block_goes_on_to_the_same_bytes(make: Make, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    changes = ("transfer.blocks.size=2", *LAYERS["documents"], f"transfer.blocks.hidden={hidden}")
    expected = run_blocks(make("name=undisturbed", "transfer.blocks.size=2", *LAYERS["documents"]))
    config = make("name=killed", *changes)
    run_blocks(config, "prepare")
    for number in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Reporter, "step", kill_at(3))
            run_blocks(config, number)
        for file in RunFolder.of(config).path.glob("hidden/boundary-001/train-000001.*") if number == 0 else ():
            file.unlink()  # as of a machine that went down before it was on the disk
        run_blocks(config, number)
    assert_same(stage_1(run_blocks(config, "stitch")), stage_1(expected))
    assert (RunFolder.of(config).path / "hidden").exists() == (hidden == "store")


def kill_at(step: int) -> Callable[..., None]:
    def act(_self: Reporter, _bar: Any, _stage: str, at: int, *_: Any) -> None:
        if at == step:
            raise Killed

    return act


def test_an_interrupted_block_hands_on_what_it_would_have(make: Make) -> None:
    """The teacher's hidden states, not those of what has been trained meanwhile; and nothing that nobody reads."""
    config = make("transfer.blocks.size=2", "transfer.blocks.keep=true")
    folder = run_blocks(config, job="prepare").path
    run_blocks(config, job=0)
    written = {file: file.read_bytes() for file in (folder / "hidden" / "boundary-001").iterdir()}
    done = folder / "checkpoints" / "transfer" / "block-000" / "done.json"
    done.unlink()
    for file in sorted(written)[::2]:
        file.unlink()
    run_blocks(config, job=0)
    assert {file: file.read_bytes() for file in (folder / "hidden" / "boundary-001").iterdir()} == written
    run_blocks(config, job=1)
    done.unlink()
    run_blocks(make("transfer.blocks.size=2", "transfer.blocks.keep=false"), job=1)  # deletes what it has read
    run_blocks(make("transfer.blocks.size=2", "transfer.blocks.keep=false"), job=0)
    assert not list((folder / "hidden").rglob("*.safetensors"))


def test_what_is_missing_is_told_with_the_command_that_makes_it(make: Make) -> None:
    config = make("transfer.blocks.size=2", "transfer.blocks.keep=true")
    folder = RunFolder.of(config)
    with pytest.raises(LolcatsError, match=r"not prepared .*lolcats block CONFIG --prepare"):
        run_blocks(config, 0)
    run_blocks(config, "prepare")
    with pytest.raises(LolcatsError, match=r"block 1 waits .* nobody trains: start lolcats block .*config.yaml 0"):
        run_blocks(config, 1)
    with pytest.raises(LolcatsError, match=r"block 0 of 2 has not been trained: start lolcats block .*config.yaml 0"):
        run_blocks(config, "stitch")
    run_blocks(config, 0)
    kept = sorted((folder.path / "hidden" / "boundary-001").iterdir())
    plan, text = Plan(4, 2), AutoConfig.from_pretrained(config.model)
    need = hidden_bytes(config, plan, text, torch.float32, validation=3, at_once=2)
    assert need <= sum(file.stat().st_size for file in kept) <= need + 4096 * len(kept)
    assert [file.name for file in kept] == [*(f"train-{n:06d}.safetensors" for n in range(5)),
                                            "validation-000.safetensors"]  # fmt: skip
    kept[2].unlink()
    with pytest.raises(LolcatsError, match=r"missing in .*boundary-001, though block 0 is finished: delete"):
        run_blocks(config, 1)
    with pytest.raises(LolcatsError, match=r"block 1 of 2 is not finished: start lolcats block .*config.yaml 1"):
        run_blocks(config, "stitch")
    run_blocks(make("transfer.blocks.size=2", "transfer.blocks.hidden=recompute"), 1)
    with hold(folder.checkpoints("transfer") / "block-001" / ".lock", ""), pytest.raises(LolcatsError, match="another"):
        run_blocks(config, 1)
    run_blocks(config, "stitch")
    assert folder.stage_state("transfer") == "finished"


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        (None, "transfer.blocks.size=3", r"does not divide the 4 layers of the model; expected one of 1, 2, 4"),
        (None, "transfer.blocks.size=null", r"size is null"),
        (None, "transfer.enabled=false", r"no first stage"),
        (2, "transfer.blocks.size=2", r"a block from 0 to 1 \(4 layers in blocks of 2\); got 2"),
        (0, "transfer.lr=0.5", None),
        (0, "transfer.batch_size=2", r"other settings: transfer.batch_size 4 -> 2"),
        (0, "data.sequence_length=12", r"made with others: the text"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(make: Make, job: Any, changes: str, message: str | None) -> None:
    if job is not None:
        run_blocks(make("transfer.blocks.size=2"), "prepare")
    config = make("transfer.blocks.size=2", changes)
    if message is None:
        run_blocks(config, job)
        return
    with pytest.raises(LolcatsError, match=message) as caught:
        run_blocks(config, job)
    assert "\n" not in str(caught.value)


def test_other_weights_are_refused(make: Make, teacher: Path, tmp_path: Path) -> None:
    run_blocks(make("transfer.blocks.size=2"), "prepare")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    model: Any = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.up_proj.weight").add_(0.01)
    model.save_pretrained(other, max_shard_size="20KB")
    shutil.rmtree(teacher_link := tmp_path / "link", ignore_errors=True)
    teacher_link.symlink_to(other)
    config = make("transfer.blocks.size=2")
    prepared = RunFolder.of(config).path / "blocks" / "prepared.json"
    prepared.write_text(prepared.read_text().replace(str(teacher), str(teacher_link)))
    with pytest.raises(LolcatsError, match=r"made with others: the weights of the teacher"):
        run_blocks(make("transfer.blocks.size=2", f"model={teacher_link}"), 0)


def test_too_small_a_disk_is_told_before_anything_is_paid_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config, usage = make("transfer.blocks.size=1", "transfer.blocks.folder=/tmp"), shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage._replace(free=70_000))
    with pytest.raises(LolcatsError, match=r"/tmp/try needs .*; free .*, or name another folder"):
        run_blocks(config, "prepare")
    assert not (RunFolder.of(config).path / "blocks" / "prepared.json").exists()
    run_blocks(make("transfer.blocks.size=1", "transfer.blocks.hidden=recompute"), "prepare")


def test_only_the_layers_of_a_block_are_ever_in_memory(make: Make, teacher: Path) -> None:
    """Counted at every block that is read, in all jobs."""
    whole: Any = LlamaForCausalLM.from_pretrained(teacher)
    layer = sum(p.numel() for p in whole.model.layers[0].parameters())
    ends = sum(p.numel() for name, p in whole.named_parameters() if ".layers." not in name)
    read: list[int] = []

    class Counted(Block):
        def __init__(self, model: Any, part: Part) -> None:
            super().__init__(model, part)
            found = [p.numel() for p in model.parameters() if not p.is_meta]
            read.append(sum(found))
            assert sum(found) <= (part.last - part.first) * layer + (ends if part.embeddings or part.head else 24)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lolcats.models.block.Block", Counted)
        run_blocks(make("transfer.blocks.size=1", *LAYERS["blend"]))
    assert len(read) == 3 * 4 + 2 and max(read) < sum(p.numel() for p in whole.parameters()) / 2
