"""The control that every mixer has to beat: a plain window that keeps as many bytes of a text."""

from __future__ import annotations

import torch

from lolcats.mixers.base import Mixer
from lolcats.mixers.blend import BlendMixer
from lolcats.ops.near import NearSpec

WINDOW_SINKS = 4
"""First tokens that a plain window keeps: without them it falls apart (arXiv 2309.17453)."""


def equal_window(mixer: Mixer, dtype: torch.dtype) -> BlendMixer:
    """Softmax attention over sinks and a window of the bytes of a mixer's state.

    Args:
        mixer: what it is compared with; pairs that it stores in fewer bits are stored so here.
        dtype: of keys and values.
    """
    sizes, stored = mixer.sizes, mixer if isinstance(mixer, BlendMixer) else None
    bits = 16 if stored is None else stored.bits
    window = BlendMixer(sizes, mixer.impl, NearSpec(1), None, None, bits=bits)
    if stored is not None:  # the very ranges, not copies
        window.key_low, window.key_high = stored.key_low, stored.key_high
    one = window.state_spec(dtype).nbytes
    window.settings = NearSpec(2)
    token = window.state_spec(dtype).nbytes - one
    tokens = max(1, 1 + (mixer.state_spec(dtype).nbytes - one) // token)
    sinks = min(WINDOW_SINKS, tokens - 1)
    window.settings = NearSpec(tokens - sinks, sinks)
    return window
