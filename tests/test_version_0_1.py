"""What version 0.1 wrote still loads and goes on: `tests/fixtures/version_0_1` was made by it (commit cdcd3fe).

In its files the added tensors lie beside the family's module and not under `mixer`, and the settings name no mixer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lolcats import convert, export_model, linearize, load_adapter, load_config
from lolcats.config import FinetuneConfig, LinearizationConfig
from lolcats.identity import SAMPLES
from lolcats.modeling.attention import added_parameters, linearized_layers
from lolcats.modeling.old_names import in_old_order, new_name, old_name
from lolcats.training.finetune import FinetuneStage

FIXTURE = Path(__file__).parent / "fixtures" / "version_0_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture, as the working directory: its settings hold paths relative to it."""
    folder = shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def names_in(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


@torch.no_grad()
def last_logits(model: Any) -> Tensor:
    size = model.config.vocab_size
    return model(input_ids=torch.arange(2, 18)[None] % size).logits[0, -1]


def test_an_artefact_loads_and_is_saved_by_the_new_names(old: Path) -> None:
    assert "model.layers.0.self_attn.feature_q.weight" in names_in(old / "artefact" / "model.safetensors")
    loaded: Any = AutoModelForCausalLM.from_pretrained(old / "artefact", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(last_logits(model), torch.tensor(EXPECTED["logits"]), atol=1e-4, rtol=0)
    model.save_pretrained(old / "again")
    saved = names_in(old / "again" / "model.safetensors")
    assert set(added_parameters(model)) <= saved
    assert all(new_name(name) == name for name in saved)
    assert torch.equal(last_logits(AutoModelForCausalLM.from_pretrained(old / "again")), last_logits(model))
    low = AutoModelForCausalLM.from_pretrained(old / "artefact", dtype=torch.bfloat16)
    assert {p.dtype for p in added_parameters(low).values()} == {torch.float32}


def test_an_old_state_dict_fits_a_model_of_today(old: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(old / "artefact")
    state = {old_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    assert "model.layers.1.self_attn.window_factor" in state
    for p in added_parameters(model).values():
        p.data.fill_(7.0)
    model.load_state_dict(state)
    torch.testing.assert_close(last_logits(model), torch.tensor(EXPECTED["logits"]), atol=1e-4, rtol=0)


def test_an_artefact_is_exported_with_todays_code(old: Path) -> None:
    (old / "artefact" / "lolcats_results.json").write_text("{}")
    folder = export_model(old / "artefact", old / "out", "remote-code").folder
    assert (folder / "lolcats_mixers_hybrid.py").is_file()
    torch.testing.assert_close(
        last_logits(AutoModelForCausalLM.from_pretrained(folder)), torch.tensor(EXPECTED["logits"]), atol=1e-4, rtol=0
    )


def test_an_adapter_loads(old: Path) -> None:
    assert any(".self_attn.query_scale" in name for name in names_in(old / "adapter" / "adapter_model.safetensors"))
    model, _ = load_adapter(old / "adapter", old / "teacher")
    torch.testing.assert_close(last_logits(model), torch.tensor(EXPECTED["logits"]), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_half_done_run_resumes(old: Path) -> None:
    """It was killed between the stages, and ends where the uninterrupted run of 0.1 did."""
    first = json.loads((old / "runs" / "half" / "results.json").read_text())
    folder = linearize(load_config(old / "runs" / "half" / "config.yaml"), resume=True)
    results = folder.results()
    assert results.complete
    assert results.perplexity["transfer"] == first["perplexity"]["transfer"], "stage 1 was done"
    assert results.best["finetune"].step == EXPECTED["finetune"]["step"]
    assert results.best["finetune"].loss == pytest.approx(EXPECTED["finetune"]["loss"], rel=1e-4)
    for name, value in EXPECTED["perplexity"].items():
        assert results.perplexity[name] == pytest.approx(value, rel=1e-4), name


def test_digests_of_weights_are_those_of_0_1(teacher: LlamaForCausalLM) -> None:
    student = convert(teacher, LinearizationConfig(decay="gate"))
    digest = hashlib.sha256()
    for name, weight in sorted((n.replace(".mixer.", "."), p) for n, p in student.named_parameters()):
        some = weight.detach().reshape(-1)
        some = some[:: max(1, some.numel() // SAMPLES)][: SAMPLES + 1]
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + some.numpy().tobytes())
    assert FinetuneStage(student, FinetuneConfig()).origin()["weights"] == digest.hexdigest()


def test_names() -> None:
    name = "base_model.model.layers.3.self_attn.feature_q.weight"
    assert new_name(name) == "base_model.model.layers.3.self_attn.mixer.feature_q.weight"
    assert new_name(new_name(name)) == new_name(name) and old_name(new_name(name)) == name
    for other in ("layers.3.self_attn.inner.q_proj.weight", "layers.3.feature_quality.weight", "feature_q.weight"):
        assert new_name(other) == old_name(other) == other
    assert new_name("optimizer:exp_avg:layers.3.self_attn.query_scale").endswith(".mixer.query_scale")


def test_parameters_are_in_the_order_of_0_1(make_student: Any) -> None:
    student = make_student(decay="gate", layers=[0, 2])
    layer = "model.layers.2.self_attn."
    names = [n.removeprefix(layer) for n in in_old_order(n for n, _ in student.named_parameters()) if layer in n]
    own = [f"inner.{x}_proj.weight" for x in "qkvo"]
    maps = [f"mixer.{x}" for x in ("feature_q.weight", "feature_k.weight", "decay_gate.weight", "decay_gate.bias")]
    assert names == ["mixer.window_factor", "mixer.query_scale", *own, *maps]
    others = [n for n, _ in student.named_parameters() if ".mixer." not in n]
    assert [n for n in in_old_order(n for n, _ in student.named_parameters()) if ".mixer." not in n] == others


def test_a_layer_has_nothing_beside_the_familys_module_and_the_mixer(make_student: Any) -> None:
    for layer in linearized_layers(make_student(decay="gate")):
        assert {name.partition(".")[0] for name, _ in layer.named_parameters()} == {"inner", "mixer"}


def test_parameters_are_read_where_they_were(make_student: Any) -> None:
    layer = linearized_layers(make_student(decay="gate"))[0]
    for name in ("feature_q", "feature_k", "window_factor", "query_scale", "decay_gate"):
        assert getattr(layer, name) is getattr(layer.mixer, name)
    with pytest.raises(AttributeError, match="no attribute 'settings'"):
        layer.settings  # noqa: B018
