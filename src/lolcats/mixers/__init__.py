"""Layers that take the place of softmax attention. They know tensors only: no transformers, no configuration."""

from lolcats.mixers.base import Call, Mixer, Sizes
from lolcats.mixers.registry import MIXERS, build_mixer
from lolcats.mixers.rotation import Reach, Rotation
from lolcats.mixers.state import State, StateSpec, state_bytes
from lolcats.mixers.window import equal_tokens, equal_window
from lolcats.ops.types import map_state, state_tensors

__all__ = [
    "MIXERS",
    "Call",
    "Mixer",
    "Reach",
    "Rotation",
    "Sizes",
    "State",
    "StateSpec",
    "build_mixer",
    "equal_tokens",
    "equal_window",
    "map_state",
    "state_bytes",
    "state_tensors",
]
