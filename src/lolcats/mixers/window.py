"""The control that every mixer has to beat: a plain window that keeps as many bytes of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lolcats.mixers.base import Mixer
from lolcats.mixers.blend import BlendMixer
from lolcats.ops.near import NearSpec

WINDOW_SINKS = 4
"""First tokens that a plain window keeps: without them it falls apart (arXiv 2309.17453)."""


def equal_window(mixer: Mixer, dtype: torch.dtype, tokens: int | None = None) -> BlendMixer:
    """Softmax attention over sinks and a window of the bytes of a mixer's state.

    Args:
        mixer: what it is compared with; pairs that it stores in fewer bits are stored so here.
        dtype: of keys and values.
        tokens: of sinks and window together; None is as many as the mixer's own state has bytes for.
    """
    window = _plain(mixer)
    share_map(window, mixer)
    tokens = equal_tokens([mixer], dtype) if tokens is None else tokens
    sinks = min(WINDOW_SINKS, tokens - 1)
    window.settings = NearSpec(tokens - sinks, sinks)
    return window


def share_map(window: BlendMixer, mixer: Mixer) -> None:
    """Give a window the map of keys of the mixer that it is for, as it is now: on another device it is another one."""
    window.key_map = mixer.key_map if isinstance(mixer, BlendMixer) else None


def equal_tokens(mixers: Sequence[Mixer], dtype: torch.dtype) -> int:
    """How many tokens, in all of these layers alike, have the bytes of their states together; 1 at least."""
    left = token = 0
    for mixer in mixers:
        window = _plain(mixer)
        one = window.state_spec(dtype).nbytes
        window.settings = NearSpec(2)
        token += window.state_spec(dtype).nbytes - one
        left += mixer.state_spec(dtype).nbytes - one
    return max(1, 1 + left // token)


def _plain(mixer: Mixer) -> BlendMixer:
    """A window of one token of the sizes and bits of a mixer."""
    bits = mixer.bits if isinstance(mixer, BlendMixer) else 16
    return BlendMixer(mixer.sizes, mixer.impl, NearSpec(1), None, None, bits=bits)
