"""Losses and outputs of both stages as version 0.1.0 gave them: what is no change of the method changes no number.

`python tests/test_golden.py` writes tests/golden.json anew, which only a change of the method may do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lolcats import LinearizationConfig, TrainingData, convert, finetune_lora, transfer_attention
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.data import PackedDataset

FILE = Path(__file__).with_name("golden.json")
LAYERS: dict[str, dict[str, Any]] = {
    "paper": {},
    "matched": {"start": "matched", "sinks": 2},
    "terraced": {"window_kind": "terraced", "decay": "gate", "state_heads": "kv"},
    "one-layer": {"layers": [1]},
    "t2r": {"feature_map": "t2r", "feature_size": 5},
    "elu": {"feature_map": "elu", "decay": "gate"},
    "relu": {"feature_map": "relu"},
    "exp_dim": {"feature_map": "exp_dim", "state_heads": "kv"},
    "no-window": {"window": 0},
}
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "usual": ({}, {"lr": 0.05, "rank": 2, "kl_factor": 1.0}),
    "weights": ({"xent_factor": 1.0, "schedule": "plateau"}, {"lr": 0.05, "rank": 2, "targets": ["q_proj"]}),
    "linear-full": ({"target": "linear"}, {"lr": 0.001, "method": "full", "train_feature_maps": True}),
}
CASES = [f"{family} {layer} usual" for family in ("llama", "gemma2") for layer in LAYERS]
CASES += [f"llama paper {stage}" for stage in STAGES if stage != "usual"]
CASES += ["llama matched usual documents", "gemma2 paper weights documents"]


def teacher(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    kinds = ["full_attention"] * 2
    return Gemma2ForCausalLM(Gemma2Config(**sizes, layer_types=kinds, query_pre_attn_scalar=6)).eval()


def data(documents: bool) -> TrainingData:
    """Ten sequences of 32 tokens; as documents, cut at places that differ."""
    ids = np.random.default_rng(0).integers(3, 97, (10, 32)).astype(np.int32)
    place = np.arange(32)[None] >= np.arange(7, 17)[:, None]
    document = place.astype(np.int32) if documents else np.zeros_like(ids)
    sets = [PackedDataset(ids[rows], np.ones((len(ids[rows]), 32), bool), document[rows])
            for rows in (slice(0, 8), slice(8, 10))]  # fmt: skip
    return TrainingData(*sets, keep_apart=documents)


def numbers(case: str) -> dict[str, Any]:
    """Both losses, the last logits of a text, and how the model goes on with another."""
    family, layer, stages, *more = case.split()
    settings: dict[str, Any] = {"window": 4} | LAYERS[layer]
    sequences = data(bool(more))
    text = torch.from_numpy(sequences.train.ids[:2]).long()
    model = convert(teacher(family), LinearizationConfig(**settings), input_ids=text)
    first, second = STAGES[stages]
    common = {"tokens": 32 * 4 * 4, "batch_size": 4, "warmup_steps": 0, "validate_every": 1}
    stage_1 = transfer_attention(model, sequences, TransferConfig(compile=False, **common, **first))
    stage_2, _ = finetune_lora(model, sequences, FinetuneConfig(**common, **second))
    with torch.no_grad():
        logits = model(input_ids=text).logits[:, -1, :8]
        prompt = text[:, :9]
        written = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
    return {
        "transfer": stage_1.final["loss"],
        "finetune": stage_2.final["loss"],
        "logits": logits.flatten().tolist(),
        "written": written[:, 9:].tolist(),
    }


@pytest.mark.parametrize("case", CASES)
def test_no_number_has_changed(case: str) -> None:
    expected, found = json.loads(FILE.read_text())[case], numbers(case)
    assert found["written"] == expected["written"]
    # Another processor adds in another order; and the first steps of AdamW are as long for a gradient that is nothing
    # but rounding as for any other, of which full fine-tuning has some.
    limits = {"logits": 0.03} if case.endswith("full") else {}
    for name in ("transfer", "finetune", "logits"):
        limit = limits.get(name, 2e-4)
        np.testing.assert_allclose(found[name], expected[name], rtol=limit, atol=limit, err_msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({case: numbers(case) for case in CASES}, indent=1) + "\n")
    sys.exit(0)
