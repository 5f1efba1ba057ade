"""lolcats: turn a pretrained softmax-attention language model into one with linear cost in length.

Importing the package also teaches transformers to load linearized models with `AutoModelForCausalLM.from_pretrained`.
"""

import logging

# bitsandbytes, which peft imports where it is installed, says at every start that a kernel for CPUs is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from lolcats.config import LinearizationConfig, RunConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.export import export_model, load_adapter
from lolcats.linearize import linearize
from lolcats.modeling import LinearizedAttention, attention_mode, convert, linearized_layers
from lolcats.ops import HybridOutput, HybridState, LinearState, MapWeights, hybrid_attention, mapped_attention
from lolcats.teacher import load_teacher
from lolcats.training import TrainingData, finetune_lora, transfer_attention

__version__ = "0.1.0"

__all__ = [
    "HybridOutput",
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
    "mapped_attention",
    "transfer_attention",
]
