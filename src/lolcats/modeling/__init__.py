"""Transformers models with linearized attention."""

from lolcats.modeling.attention import AttentionCall, LinearizedAttention, attention_mode, linearized_layers
from lolcats.modeling.cache import LinearizedLayer
from lolcats.modeling.cache_contents import state_bytes
from lolcats.modeling.check import Fact, FamilyCheck, check_family, check_model
from lolcats.modeling.convert import convert
from lolcats.modeling.hf import LolcatsConfig

__all__ = [
    "AttentionCall",
    "Fact",
    "FamilyCheck",
    "LinearizedAttention",
    "LinearizedLayer",
    "LolcatsConfig",
    "attention_mode",
    "check_family",
    "check_model",
    "convert",
    "linearized_layers",
    "state_bytes",
]
