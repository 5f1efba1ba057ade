"""The artefact put together from files is the one that is saved of a model in memory, to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lolcats import LinearizationConfig, LolcatsError, convert, export_model, linearize, load_config
from lolcats.config import FinetuneConfig, RunConfig
from lolcats.modeling.attention import added_parameters, measured_buffers
from lolcats.models.teacher import load_tokenizer
from lolcats.runs.assembled import Trained, assemble
from lolcats.runs.trained import added_file, assemble_run
from lolcats.training.lora import add_lora

KINDS = [
    ["finetune.targets=all", "finetune.train_feature_maps=true"],
    ["linearization.mixer=blend", "linearization.bits=8", "finetune.rank=3", "dtype=bfloat16"],
    ["finetune.method=full", "linearization.layers=[1]"],
    ["finetune.enabled=false", "transfer.enabled=false"],
]
QUICK = [
    "transfer.tokens=192", "finetune.tokens=192", "evaluation.controls=[]", "transfer.recall.share=0",
    "finetune.kl_factor=0",
]  # fmt: skip


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    assert not [name for name in left if left[name].dtype != right[name].dtype]
    assert not [name for name in left if not torch.equal(left[name], right[name])]
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_is_the_artefact_of_the_run(make_config: Callable[..., RunConfig], tmp_path: Path, kind: list[str]) -> None:
    run = linearize(make_config(*QUICK, *kind))
    for shard_bytes in (10**9, 5000):
        target = tmp_path / f"shards-{shard_bytes}"
        target.mkdir()
        assemble_run(run, target, shard_bytes)
        assert_same(target, run.model)
    assert len([*target.glob("*.safetensors")]) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "tied llama"])
def test_lora_is_merged_as_peft_does(
    make_teacher: Callable[..., LlamaForCausalLM], tmp_path: Path, family: str, dtype: torch.dtype,
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where the weight is turned, where matrices are tied, and where the rows come in pieces."""
    shape = GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=1, eos_token_id=2)
    model: Any = GPT2LMHeadModel(shape) if family == "gpt2" else make_teacher(tie_word_embeddings=True)
    model.to(dtype).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    layers = LinearizationConfig(window=4)
    convert(model, layers, seed=0)
    adapter = add_lora(model, FinetuneConfig(rank=3, alpha=7.0, targets="all"))
    for name, p in adapter.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p)
    lora = {n.removeprefix("base_model.model."): p.clone() for n, p in adapter.named_parameters() if ".lora_" in n}
    added = {n: p.clone() for n, p in {**added_parameters(model), **measured_buffers(model)}.items()}
    adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(str(tmp_path / "teacher")).save_pretrained(tmp_path / "merged")
    monkeypatch.setattr("lolcats.models.shards.PIECE", 200)
    (tmp_path / "out").mkdir()
    assemble(tmp_path / "out", tmp_path / "teacher", layers, Trained(added, lora, 7.0 / 3), shard_bytes=5000)
    assert_same(tmp_path / "out", tmp_path / "merged")


def test_what_does_not_belong_together_is_refused(
    make_student: Callable[..., PreTrainedModel], teacher: LlamaForCausalLM, tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    added = {n: p.detach() for n, p in added_parameters(make_student()).items()}
    layers, name = LinearizationConfig(), "model.layers.1.self_attn.inner.q_proj"
    pair = {f"{name}.lora_A.weight": torch.zeros(2, 36), f"{name}.lora_B.weight": torch.zeros(36, 2)}

    def refused(match: str, trained: Trained, layers: Any = layers) -> None:
        with pytest.raises(LolcatsError, match=match):
            assemble(tmp_path, tmp_path / "teacher", layers, trained)

    refused(r"is missing", Trained({}))
    refused(r"adapts .*q_proj of shape \[36, 35\], the teacher's is \[36, 36\]",
            Trained(added, pair | {f"{name}.lora_A.weight": torch.zeros(2, 35)}))  # fmt: skip
    refused(r"adapts .*x_proj, of which the teacher has no weight",
            Trained(added, {n.replace("q_proj", "x_proj"): t for n, t in pair.items()}))  # fmt: skip
    refused(r"expected LoRA matrices; got x.dora", Trained(added, {"x.dora": torch.zeros(1)}))
    refused(r"model.layers.9.x has no place", Trained(added | {"model.layers.9.x": torch.zeros(1)}))
    refused(r"know their split", Trained(added), load_config(None, ["linearization.mixer=blend",
            "linearization.budget=heads"]).linearization)  # fmt: skip
    nan = added | {min(added): torch.full_like(added[min(added)], float("nan"))}
    refused(r"has values that are not finite", Trained(nan))
    with pytest.raises(LolcatsError, match=r"are packed \(GGUF\) .*; finish it$"):
        assemble(tmp_path, "demo", layers, Trained(added))
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=1, num_local_experts=2))  # fmt: skip
    mixtral.save_pretrained(tmp_path / "mixtral")
    tiny_tokenizer.save_pretrained(tmp_path / "mixtral")
    with pytest.raises(LolcatsError, match=r"hold its weights in another form"):
        assemble(tmp_path, tmp_path / "mixtral", layers, Trained(added))


@pytest.mark.parametrize("format", ["merged", "remote-code", "adapter"])
def test_a_run_that_could_not_save_its_model_is_exported(
    make_config: Callable[..., RunConfig], tmp_path: Path, format: str
) -> None:
    run = linearize(make_config(*QUICK, "linearization.mixer=blend", "finetune.train_feature_maps=true"))
    whole = export_model(run.path, tmp_path / "whole", format).folder
    shutil.rmtree(run.model)
    out = export_model(run.path, tmp_path / "out", format).folder
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    left, right = tensors(whole), tensors(out)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    for name in ("lolcats_recipe.yaml", *(["config.json"] if format != "adapter" else ["adapter_config.json"])):
        assert (whole / name).read_text() == (out / name).read_text()
    added_file(run).unlink()
    with pytest.raises(LolcatsError, match=r"is a run without a model yet; finish it"):
        export_model(run.path, tmp_path / "none", format)


def test_a_run_that_is_not_done_is_not_exported(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = linearize(make_config(*QUICK))
    shutil.rmtree(run.model)
    (run.checkpoints("finetune") / "last.safetensors").unlink()
    with pytest.raises(LolcatsError, match=r"whose stage finetune is not done; finish it first"):
        export_model(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
