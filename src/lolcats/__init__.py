"""lolcats: turn a pretrained softmax-attention language model into one with linear cost in length.

Importing the package also teaches transformers to load linearized models with `AutoModelForCausalLM.from_pretrained`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

# bitsandbytes, which peft imports where it is installed, says at every start that a kernel for CPUs is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from lolcats.config import LinearizationConfig, RunConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.modeling import LinearizedAttention, attention_mode, convert, linearized_layers
from lolcats.models.teacher import load_teacher
from lolcats.ops import HybridOutput, HybridSpec, HybridState, LinearState, MapWeights, hybrid_attention

if TYPE_CHECKING:
    from lolcats.export import export_model, load_adapter
    from lolcats.runs.recipe import linearize
    from lolcats.training import TrainingData, finetune_lora, transfer_attention

__version__ = "0.1.0"

__all__ = [
    "HybridOutput",
    "HybridSpec",
    "HybridState",
    "LinearState",
    "LinearizationConfig",
    "LinearizedAttention",
    "LolcatsError",
    "MapWeights",
    "RunConfig",
    "TrainingData",
    "__version__",
    "attention_mode",
    "convert",
    "export_model",
    "finetune_lora",
    "hybrid_attention",
    "linearize",
    "linearized_layers",
    "load_adapter",
    "load_config",
    "load_teacher",
    "transfer_attention",
]

# These import peft and accelerate, which take longer to import than all the rest: only who uses them waits for them.
_LATER = {
    "export_model": "lolcats.export",
    "load_adapter": "lolcats.export",
    "linearize": "lolcats.runs.recipe",
    "TrainingData": "lolcats.training",
    "finetune_lora": "lolcats.training",
    "transfer_attention": "lolcats.training",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value
