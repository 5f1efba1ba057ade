"""The whole recipe on a tiny model, tokenizer and text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from killing import Killed
from lolcats import LolcatsError, RunConfig, linearize, linearized_layers, load_config
from lolcats.config import dump_config
from lolcats.data import build_datasets
from lolcats.evaluation import Variant, measure
from lolcats.runs import loading, parts
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results, read_results
from lolcats.training import Reporter

BLEND = ["linearization.mixer=blend", "linearization.kept.pairs=2"]


def comparable(results: Results) -> dict[str, Any]:
    """Results without what the clock says."""
    return results.model_dump(exclude={"seconds", "tokens_per_second", "date"})


def artefact_perplexity(folder: RunFolder, config: RunConfig) -> float:
    """Measured anew from the files alone."""
    model = AutoModelForCausalLM.from_pretrained(folder.model)
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    _, held = build_datasets(config.data, tokenizer, config.seed)
    return measure({"x": Variant(model)}, torch.from_numpy(held.ids).long())["x"].perplexity


def test_a_whole_run(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    folder = linearize(config)
    results = folder.results()
    controls = {"window_only", "linear_only", "no_attention"}
    assert set(results.perplexity) == {"teacher", "training_free", "equal_window", "transfer", "student"} | controls
    assert set(results.kl) == set(results.perplexity)
    assert results.kl["teacher"] == pytest.approx(0, abs=1e-6)
    assert all((value or 0) > 1e-4 for name, value in results.kl.items() if name not in ("teacher", "equal_window"))
    assert results.tokens == {"transfer": 480, "finetune": 480}
    assert set(results.seconds) == {"loading", "transfer", "finetune", "measuring", "total"}
    assert results.seconds["total"] > results.seconds["transfer"] > 0
    assert all(speed > 0 for speed in results.tokens_per_second.values())
    assert results.device and results.device.startswith("cpu")
    assert results.dtype == "float32"
    assert results.evaluation.model_dump() == {"segments": 3, "length": 24, "last": None, "tokens": 69}
    assert set(results.best) == {"transfer", "finetune"}
    assert results.generation["teacher"] is not None and results.generation["student"] is not None
    assert results.complete is True

    assert artefact_perplexity(folder, config) == pytest.approx(results.perplexity["student"], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(folder.model)
    assert len(linearized_layers(model)) == 2
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert read_results(folder.model / "lolcats_results.json") == results
    assert load_config(folder.model / "lolcats_recipe.yaml") == config == load_config(folder.config_file)
    assert not [p for p in folder.path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".tmp")]
    steps = [(line["stage"], line["step"]) for line in map(json.loads, folder.metrics_file.read_text().splitlines())
             if "lr" in line]  # fmt: skip
    assert steps == [(stage, step) for stage in ("transfer", "finetune") for step in range(1, 6)]


@pytest.mark.slow
def test_measured_perplexities_are_those_of_the_models(
    make_config: Callable[..., RunConfig], model_folder: Path
) -> None:
    config = make_config("finetune.enabled=false")
    folder = linearize(config)
    results = folder.results()
    teacher = AutoModelForCausalLM.from_pretrained(model_folder)
    _, held = build_datasets(config.data, AutoTokenizer.from_pretrained(model_folder), config.seed)
    ids = torch.from_numpy(held.ids).long()
    with torch.no_grad():
        loss = float(teacher(ids, labels=ids).loss)
    assert results.perplexity["teacher"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert results.perplexity["transfer"] == results.perplexity["student"]
    assert artefact_perplexity(folder, config) == pytest.approx(results.perplexity["student"], rel=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(folder.model).state_dict()
    for name, value in teacher.state_dict().items():
        assert torch.equal(trained[name.replace("self_attn.", "self_attn.inner.")], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["transfer.enabled=false"],
        ["transfer.enabled=false", "finetune.enabled=false"],
        ["finetune.method=full", "finetune.lr=1e-3"],
        ["finetune.method=full", "finetune.kl_factor=0", "linearization.layers=[1]"],
        ["finetune.merge=false"],
        ["finetune.train_feature_maps=true", "finetune.targets=[q_proj, down_proj]"],
        ["transfer.target=linear", "linearization.decay=gate", "linearization.state_heads=kv"],
        ["transfer.random_window=[16, 32]", "finetune.window_dropout=[0.9, 0.5]", "finetune.near_weight=0.5"],
        ["transfer.target=parts", "finetune.targets=no_qk", "finetune.near_weight=0", *BLEND],
        ["transfer.target=far", "transfer.compile=auto", *BLEND],
        ["dtype=bfloat16"],
    ],
    ids=str,
)
def test_the_artefact_is_what_was_measured(make_config: Callable[..., RunConfig], overrides: list[str]) -> None:
    config = make_config(*overrides)
    folder = linearize(config)
    expected = folder.results().perplexity["student"]
    tolerance = 2e-2 if config.dtype == "bfloat16" else 1e-4
    assert artefact_perplexity(folder, config) == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kl_factor", [0, 1])
def test_distances_of_full_fine_tuning_are_from_the_teacher(
    make_config: Callable[..., RunConfig], model_folder: Path, kl_factor: int
) -> None:
    """Its weights were trained over, so it is loaded again, or the copy of the training is taken."""
    config = make_config("finetune.method=full", "finetune.lr=1e-3", f"finetune.kl_factor={kl_factor}")
    folder = linearize(config)
    student = AutoModelForCausalLM.from_pretrained(folder.model)
    teacher = AutoModelForCausalLM.from_pretrained(model_folder)
    _, held = build_datasets(config.data, AutoTokenizer.from_pretrained(folder.model), config.seed)
    scores = measure({"x": Variant(student)}, torch.from_numpy(held.ids).long(), teacher=Variant(teacher))
    found = folder.results().kl
    assert found["student"] == pytest.approx(scores["x"].kl, rel=1e-3) and found["student"] != found["transfer"]
    assert set(found) == set(folder.results().perplexity)


def kill_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    original = Reporter.step

    def killing(self: Reporter, bar: Any, name: str, now: int, *args: Any, **kwargs: Any) -> None:
        original(self, bar, name, now, *args, **kwargs)
        if (name, now) == (stage, step):
            raise Killed

    monkeypatch.setattr(Reporter, "step", killing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "step"), [("transfer", 1), ("transfer", 3), ("transfer", 5), ("finetune", 1), ("finetune", 4)]
)
def test_killed_and_resumed_is_uninterrupted(
    make_config: Callable[..., RunConfig], tmp_path: Path, stage: str, step: int
) -> None:
    config = make_config()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, stage, step)
        with pytest.raises(Killed):
            linearize(config)
    resumed = linearize(config, resume=True)
    whole = linearize(make_config("name=whole"))
    assert comparable(resumed.results()) == comparable(whole.results())
    assert (resumed.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    assert len(resumed.metrics_file.read_text().splitlines()) == len(whole.metrics_file.read_text().splitlines())


@pytest.mark.slow
def test_killed_while_measuring_is_uninterrupted(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    calls = iter(range(100))
    original = parts.measure

    def killing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(parts, "measure", killing)
    with pytest.raises(Killed):
        linearize(config)
    resumed = linearize(config, resume=True)
    assert comparable(resumed.results()) == comparable(linearize(make_config("name=whole")).results())


@pytest.mark.slow
def test_a_run_that_could_not_be_saved_is_saved_on_resume(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()

    def full(self: Any, folder: Path, **_: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        with pytest.raises(LolcatsError, match=r"cannot write .*model: No space left.*before is untouched"):
            linearize(config)
    folder = RunFolder(Path(config.runs_dir) / config.name)
    assert not folder.model.exists()
    assert [path.name for path in folder.path.glob(".*")] == [".lock"]
    resumed = linearize(config, resume=True)
    assert artefact_perplexity(resumed, config) == pytest.approx(resumed.results().perplexity["student"], rel=1e-4)


@pytest.mark.slow
def test_a_complete_run_is_not_run_again(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    first = linearize(config)
    before = {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()}
    monkeypatch.setattr(loading, "load_teacher", None)  # would fail
    linearize(config, resume=True)
    assert {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()} == before


def test_a_run_that_failed_before_it_began_gives_way(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("data.sources=[missing-file.jsonl]")
    folder = RunFolder.of(config)
    folder.prepare(config)
    other = make_config("seed=3")
    folder.prepare(other)
    assert folder.config_file.read_text() == dump_config(other)
    folder.config_file.write_text("# mine\n" + dump_config(other))
    with pytest.raises(LolcatsError, match="already holds a run"):
        folder.prepare(other)


@pytest.mark.slow
def test_an_existing_run_is_kept_unless_told_otherwise(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("transfer.enabled=false", "finetune.enabled=false")
    folder = linearize(config)
    before = folder.results_file.read_bytes()
    with pytest.raises(LolcatsError, match=r"already holds a run; resume it, overwrite it"):
        linearize(config)
    with pytest.raises(LolcatsError, match=r"other settings"):
        linearize(make_config("transfer.enabled=false", "finetune.enabled=false", "seed=1"), resume=True)
    assert folder.results_file.read_bytes() == before
    mark = folder.path / "old"
    mark.touch()
    linearize(config, overwrite=True)
    assert not mark.exists()


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_folder_that_is_no_run_is_never_touched(make_config: Callable[..., RunConfig], option: str) -> None:
    config = make_config()
    theirs = Path(config.runs_dir) / config.name / "thesis.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of work")
    with pytest.raises(LolcatsError, match=r"is not a run of lolcats"):
        linearize(config, resume=option == "resume", overwrite=option == "overwrite")
    assert theirs.read_text() == "years of work"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=/nowhere/at/all", "/nowhere/at/all"),
        ("data.sources=[/nowhere/at/all.txt]", "/nowhere/at/all.txt"),
        ("data.sequence_length=100000", "data too small"),
        ("linearization.layers=[7]", r"\[7\]"),
        ("finetune.targets=[nope]", "nope"),
        ("evaluation.last=24", "evaluation.last=24"),
    ],
)
def test_mistakes_are_explained_and_can_be_mended(
    make_config: Callable[..., RunConfig], override: str, message: str
) -> None:
    with pytest.raises(LolcatsError, match=message):
        linearize(make_config(override))
    assert not (Path(make_config().runs_dir) / "try" / "model").exists()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_artefact(make_config: Callable[..., RunConfig]) -> None:
    files = [linearize(make_config(f"name={name}", f"seed={seed}")).model / "model.safetensors"
             for name, seed in (("a", 3), ("b", 3), ("c", 4))]  # fmt: skip
    first, same, other = (file.read_bytes() for file in files)
    assert first == same != other


@pytest.mark.slow
def test_documents_kept_apart(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    lines = tmp_path / "many.jsonl"
    sentence = "The river runs through a green valley, and the old mill still turns. "
    lines.write_text("".join(json.dumps({"text": sentence[i % 9 : 20 + 7 * (i % 5)]}) + "\n" for i in range(60)))
    config = make_config(f"data.sources=[{lines}]", "data.packing=documents")
    results = linearize(config).results()
    assert all(value and math.isfinite(value) for value in results.perplexity.values())
