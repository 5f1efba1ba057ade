"""Teachers in 8 or 4 bits by bitsandbytes: loading them, and making ordinary weights of them again.

Both stages train on the quantized weights, which stay as they are: feature maps and LoRA matrices are float32 beside
them (QLoRA, arXiv 2305.14314). The artefact holds ordinary weights: the quantized ones written out, with the adapters
merged into them afterwards, so that it is the function that was trained. Merging first and quantizing again is not.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from peft import PeftModel

Quantization = Literal["none", "8bit", "4bit"]


def quantization_config(kind: Quantization, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """What `from_pretrained` wants: int8, or NF4 with its scales quantized too; products in `dtype` (bfloat16).

    Raises:
        LolcatsError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LolcatsError(f'quantization {kind} needs the package bitsandbytes: pip install "lolcats[quantized]"')
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # said again at every product
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
    )


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights on CPUs: the product with repacked ones gives no gradient.

    bitsandbytes 0.50 repacks at the first call in evaluation mode, silently; what is trained before such a layer would
    then get no gradient through it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def is_quantized(model: nn.Module) -> bool:
    """Whether some of the weights are integers."""
    return any(not p.is_floating_point() for p in model.parameters())


def forget_quantization(model: PreTrainedModel) -> None:
    """Take the notes of quantization off a model whose weights are ordinary."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Write the quantized weights out in `dtype`, in place."""
    cast(Any, model).dequantize(dtype)
    forget_quantization(model)


def dequantize_below(adapter: PeftModel, dtype: torch.dtype) -> PeftModel:
    """The same adapter on ordinary weights in `dtype`; the quantized ones are written out in place."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    name = str(adapter.active_adapter)
    config, state = adapter.peft_config[name], get_peft_model_state_dict(adapter)
    state = {key: value.clone() for key, value in state.items()}
    model = cast(PreTrainedModel, cast(Any, adapter).unload())
    dequantize(model, dtype)
    plain = get_peft_model(model, config)
    set_peft_model_state_dict(plain, state)
    return cast("PeftModel", plain)
