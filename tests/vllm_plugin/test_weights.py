"""Quantized weights and adapters of linearized models, as vLLM reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_plugin.equality import FEW, Text, assert_same, beginning, by_generate, by_vllm, written_by
from vllm_plugin.test_offline import EXACT, RECOMMENDED

pytestmark = pytest.mark.slow
WHOLE = RECOMMENDED | {"bits": 16}
GROUP = 32
"""Numbers that share a scale."""
WEIGHTS = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
}  # fmt: skip
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head", "re:.*mixer.*", "model.layers.0.self_attn.inner.o_proj"],
}  # fmt: skip


def quantize(folder: Path, packed: Path, plain: Path) -> None:
    """Write a model's layers in 4 bits, and in another folder as the ordinary weights that these stand for."""
    for new in (packed, plain):
        shutil.copytree(folder, new)
    weights = load_file(folder / "model.safetensors")
    small, written = dict(weights), dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or module in QUANTIZATION["ignore"]:
            continue
        groups = weight.unflatten(1, (-1, GROUP))
        scale = groups.abs().amax(-1) / 7
        numbers = (groups / scale[..., None]).round()
        del small[name]
        small[f"{module}.weight_packed"] = pack(numbers.flatten(1))
        small[f"{module}.weight_scale"] = scale
        small[f"{module}.weight_shape"] = torch.tensor(weight.shape)
        written[name] = (numbers * scale[..., None]).flatten(1)
    save_file(small, packed / "model.safetensors", {"format": "pt"})
    save_file(written, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))


def pack(numbers: Tensor) -> Tensor:
    """Whole numbers from -8 to 7 [rows, columns] -> [rows, columns / 8] int32, the first in the lowest bits."""
    places = torch.arange(8) * 4
    packed = ((numbers.long() + 8).unflatten(1, (-1, 8)) << places).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def distance(got: list[Text], expected: list[Text]) -> float:
    """Mean difference of the log probabilities of first tokens."""
    pairs = zip(got, expected, strict=True)
    return sum(abs(x.logprobs[0] - float(y.every[0][x.tokens[0]])) for x, y in pairs) / len(got)


def test_weights_of_4_bits(linearized: Callable[..., Path], tmp_path: Path) -> None:
    """They are those that they stand for, but for bfloat16, which vLLM's product with them wants.

    What lolcats added is not quantized, nor is what is to be ignored, by the name that it has in the folder.
    """
    folder, packed, plain = linearized(**WHOLE), tmp_path / "packed", tmp_path / "plain"
    quantize(folder, packed, plain)
    got = by_vllm(packed, dtype="bfloat16")[0]
    assert_same(beginning(got, 1), beginning(by_generate(plain), 1), 0.5)
    assert distance(got, by_generate(plain)) < distance(got, by_generate(folder)) / 3


def test_adapters_at_run_time(linearized: Callable[..., Path], tmp_path: Path) -> None:
    """One changes the text as peft does; the model without it stays as it was."""
    folder, adapter = linearized(**WHOLE), tmp_path / "adapter"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(str(adapter))
    expected = by_generate(folder, FEW)
    adapted = written_by(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter)), FEW)
    assert all(one.tokens != two.tokens for one, two in zip(adapted, expected, strict=True))
    got = by_vllm(folder, lengths=FEW, adapters=(adapter, None, adapter), enable_lora=True, max_lora_rank=8)
    for texts, wanted in zip(got, (adapted, expected, adapted), strict=True):
        assert_same(texts, wanted, EXACT)
