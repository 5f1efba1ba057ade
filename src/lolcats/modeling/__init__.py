"""Transformers models with linearized attention."""

from lolcats.modeling.attention import AttentionCall, LinearizedAttention, Mode
from lolcats.modeling.cache import LinearizedLayer, state_bytes
from lolcats.modeling.check import check_family
from lolcats.modeling.convert import attention_mode, convert, linearized_layers
from lolcats.modeling.hf import LolcatsConfig

__all__ = [
    "AttentionCall",
    "LinearizedAttention",
    "LinearizedLayer",
    "LolcatsConfig",
    "Mode",
    "attention_mode",
    "check_family",
    "convert",
    "linearized_layers",
    "state_bytes",
]
