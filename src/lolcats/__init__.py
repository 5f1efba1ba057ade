"""lolcats: turn a pretrained softmax-attention language model into one with linear cost in length.

Importing the package also teaches transformers to load linearized models with `AutoModelForCausalLM.from_pretrained`.
"""

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

# bitsandbytes, which peft imports where it is installed, says at every start that a kernel for CPUs is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from lolcats.version import __version__

if "lolcats_command" not in sys.modules:  # the command line imports it when a verb runs
    import lolcats.modeling  # noqa: F401  # registers the classes of linearized models

if TYPE_CHECKING:
    from lolcats.config import LinearizationConfig, RunConfig, load_config
    from lolcats.errors import LolcatsError
    from lolcats.export import export_model, load_adapter
    from lolcats.modeling import LinearizedAttention, attention_mode, convert, linearized_layers
    from lolcats.modeling.continuing import continue_from
    from lolcats.modeling.decode_graphs import set_decode_graphs
    from lolcats.modeling.saved_state import load_state, save_state
    from lolcats.models.teacher import load_teacher
    from lolcats.ops import HybridOutput, HybridSpec, HybridState, LinearState, MapWeights, hybrid_attention
    from lolcats.runs.recipe import linearize
    from lolcats.serving.offline import generate_batch
    from lolcats.training import TrainingData, finetune_lora, transfer_attention

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
    "continue_from",
    "convert",
    "export_model",
    "finetune_lora",
    "generate_batch",
    "hybrid_attention",
    "linearize",
    "linearized_layers",
    "load_adapter",
    "load_config",
    "load_state",
    "load_teacher",
    "save_state",
    "set_decode_graphs",
    "transfer_attention",
]

# Each is imported at its first use: peft and accelerate take longer to import than all the rest.
_PLACES = {
    "lolcats.config": ("LinearizationConfig", "RunConfig", "load_config"),
    "lolcats.errors": ("LolcatsError",),
    "lolcats.export": ("export_model", "load_adapter"),
    "lolcats.modeling": ("LinearizedAttention", "attention_mode", "convert", "linearized_layers"),
    "lolcats.modeling.continuing": ("continue_from",),
    "lolcats.modeling.decode_graphs": ("set_decode_graphs",),
    "lolcats.modeling.saved_state": ("load_state", "save_state"),
    "lolcats.models.teacher": ("load_teacher",),
    "lolcats.ops": (
        "HybridOutput",
        "HybridSpec",
        "HybridState",
        "LinearState",
        "MapWeights",
        "hybrid_attention",
    ),
    "lolcats.runs.recipe": ("linearize",),
    "lolcats.serving.offline": ("generate_batch",),
    "lolcats.training": ("TrainingData", "finetune_lora", "transfer_attention"),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACE_OF[name]), name)
    globals()[name] = value
    return value
