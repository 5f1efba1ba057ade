"""The adapter: small, valid for peft, and on its base model the same model as the merged one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lolcats import LolcatsError, convert, export_model, linearized_layers, load_adapter, load_config
from lolcats.runs.folder import RunFolder

from .conftest import Runs

pytestmark = pytest.mark.usefixtures("no_gradients")

KINDS = [
    [],
    ["finetune.targets=all", "finetune.train_feature_maps=true"],
    ["finetune.merge=false", "linearization.layers=[1]", "linearization.feature_map=t2r"],
    ["linearization.decay=gate", "linearization.state_heads=kv", "finetune.train_feature_maps=true"],
    ["finetune.enabled=false"],
    ["transfer.enabled=false"],
    ["linearization.mixer=blend", "linearization.bits=4", "linearization.start=matched", "linearization.far=none"],
]


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapter_on_its_base_is_the_model(runs: Runs, ids: Tensor, tmp_path: Path, kind: list[str]) -> None:
    run = runs(*kind)
    done = export_model(run.path, tmp_path / "out", "adapter")
    expected = logits(AutoModelForCausalLM.from_pretrained(run.model), ids)
    adapter, tokenizer = load_adapter(done.folder)
    torch.testing.assert_close(logits(adapter, ids), expected, atol=2e-4, rtol=1e-4)
    assert tokenizer.decode(tokenizer("the river")["input_ids"]) == "the river"
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, atol=2e-4, rtol=1e-4)
    assert merged.config.linearization == load_config(run.config_file).linearization.model_dump(mode="json")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_peft_alone_puts_it_on_a_converted_model(runs: Runs, ids: Tensor, tmp_path: Path, kind: list[str]) -> None:
    """LoRA and feature maps by `PeftModel.from_pretrained`; both are needed for the model's logits."""
    run = runs(*kind)
    folder = export_model(run.path, tmp_path / "out", "adapter").folder
    config = load_config(run.config_file)
    teacher = AutoModelForCausalLM.from_pretrained(config.model)
    convert(teacher, config.linearization.model_copy(update={"start": "paper"}))
    untrained = logits(teacher, ids)
    adapter = PeftModel.from_pretrained(teacher, str(folder))
    expected = logits(AutoModelForCausalLM.from_pretrained(run.model), ids)
    torch.testing.assert_close(logits(adapter, ids), expected, atol=2e-4, rtol=1e-4)
    with adapter.disable_adapter():
        without_lora = logits(adapter, ids)
    for other in (untrained, without_lora):
        assert (other - expected).abs().max() > 1e-2
    assert (untrained - without_lora).abs().max() > 1e-2


@pytest.mark.slow
def test_only_what_was_trained_is_in_it(runs: Runs, tmp_path: Path) -> None:
    run = runs()
    done = export_model(run.path, tmp_path / "out", "adapter")
    tensors = load_file(done.folder / "adapter_model.safetensors")
    ends = {"lora_A.weight", "lora_B.weight", "feature_q.weight", "feature_k.weight", "window_factor", "query_scale"}
    assert {next(e for e in ends if n.endswith(e)) for n in tensors} == ends
    assert {p.name for p in done.folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "lolcats_recipe.yaml", "lolcats_results.json"
    }  # fmt: skip
    weights = (run.model / "model.safetensors").stat().st_size
    assert done.model_size == weights
    assert (done.folder / "adapter_model.safetensors").stat().st_size < weights / 4


@pytest.mark.slow
def test_the_kept_adapter_serves_where_the_checkpoints_are_gone(runs: Runs, ids: Tensor, tmp_path: Path) -> None:
    run = runs("finetune.merge=false")
    shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    adapter, _ = load_adapter(export_model(tmp_path / "run", tmp_path / "out", "adapter").folder)
    expected = logits(AutoModelForCausalLM.from_pretrained(run.model), ids)
    torch.testing.assert_close(logits(adapter, ids), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_model_in_parts_is_read(runs: Runs, tmp_path: Path) -> None:
    run = runs()
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors.index.json"))
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(run.model).save_pretrained(tmp_path / "run" / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "run" / "model").glob("*.safetensors"))) > 1
    one, parts = (export_model(p, tmp_path / f"out-{p.name}", "adapter").folder for p in (run.path, tmp_path / "run"))
    first, second = (load_file(p / "adapter_model.safetensors") for p in (one, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_runs_without_an_adapter_are_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match=r"finetune.method=full.*format merged"):
        export_model(runs("finetune.method=full").path, tmp_path / "out", "adapter")
    shutil.copytree(runs().model, tmp_path / "alone")
    with pytest.raises(LolcatsError, match=r"merged weights only.*folder of the run"):
        export_model(tmp_path / "alone", tmp_path / "out", "adapter")
    shutil.copytree(runs().path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(LolcatsError, match=r"no .*best.safetensors.*format merged"):
        export_model(tmp_path / "run", tmp_path / "out", "adapter")
    assert not (tmp_path / "out").exists()


def test_the_model_inside_a_run_leads_to_its_run(runs: Runs, tmp_path: Path) -> None:
    one, other = (export_model(p, tmp_path / p.name, "adapter").folder for p in (runs().path, runs().model))
    for file in ("adapter_model.safetensors", "lolcats_recipe.yaml"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_the_base_can_be_named_and_given(runs: Runs, tmp_path: Path) -> None:
    run = runs()
    folder = export_model(run.path, tmp_path / "out", "adapter", base="someone/teacher").folder
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/teacher"
    adapter, _ = load_adapter(folder, load_config(run.config_file).model, dtype=torch.bfloat16)
    assert {p.dtype for layer in linearized_layers(adapter) for p in layer.mixer.parameters()} == {torch.float32}
    assert adapter.get_base_model().dtype == torch.bfloat16


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"hidden_size": 40}, {"head_dim": 8}], ids=str)
def test_another_base_is_refused(runs: Runs, tmp_path: Path, change: dict[str, int]) -> None:
    run: RunFolder = runs()
    teacher = load_config(run.config_file).model
    shutil.copytree(teacher, tmp_path / "other")
    config: Any = LlamaConfig.from_pretrained(teacher)
    for name, value in change.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    folder = export_model(run.path, tmp_path / "out", "adapter").folder
    with pytest.raises(LolcatsError, match=r"does not fit the base model .*other"):
        load_adapter(folder, tmp_path / "other")


def test_what_is_no_adapter_is_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match=r"no exported adapter"):
        load_adapter(runs().model)
    with pytest.raises(LolcatsError, match=r"neither a folder nor a name on the hub"):
        load_adapter(tmp_path / "nowhere")
