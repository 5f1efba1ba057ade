"""Window and kept pairs in 8 or 4 bits: keys by channel, values by token.

A key's channel c is one of 2^b numbers evenly spaced from low_c to high_c, which belong to the layer; a token's value
is one of 2^b numbers from the least to the largest of its channels, which are stored with it, as float16. (Keys have
channels that are large in every token, values do not: KIVI, arXiv 2402.02750, KVQuant, arXiv 2401.18079.) Attention
sees rounded pairs everywhere, so a text is the same read at once and token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.near.types import KeptPairs, NearRing, NearState
from lolcats.ops.types import SinkKeys

BITS = (4, 8)
SHRINKS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6)
"""Of the range of a channel: rarely reached ends may cost more than they are worth."""


class PairCodec(NamedTuple):
    """How pairs become bytes."""

    bits: int
    """4 or 8."""
    low: Tensor
    """[KV, D], the least number that a key's channel can be."""
    high: Tensor
    """[KV, D], the largest one."""

    @property
    def levels(self) -> int:
        """Steps between the least and the largest number."""
        return 2**self.bits - 1

    def round_keys(self, k: Tensor) -> Tensor:
        """Keys [B, KV, N, D] as they are after encoding and decoding, in their dtype.

        Gradients pass through the rounding as if it were none; to k where it is within the range, and to the range.
        """
        low, step = self._range(k)
        code = _rounded(((_wide(k) - low) / step).clamp(0, self.levels))
        return (low + code * step).to(k.dtype)

    def round_values(self, v: Tensor) -> Tensor:
        """Values [B, KV, N, Dv] as they are after encoding and decoding, in their dtype."""
        low, step = self._spread(v)
        code = _rounded((_wide(v) - low) / step).clamp(0, self.levels)
        return (low + code * step).to(v.dtype)

    @torch.no_grad()
    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of keys [B, KV, N, D b/8] and values [B, KV, N, Dv b/8 + 4], the last four of which are the range."""
        low, step = self._range(k)
        keys = self._pack(((_wide(k) - low) / step).clamp(0, self.levels).round())
        low, step = self._spread(v)
        values = self._pack(((_wide(v) - low) / step).round().clamp(0, self.levels))
        spread = torch.cat([low, step], -1).to(torch.float16).view(torch.uint8)
        return keys, torch.cat([values, spread], -1)

    @torch.no_grad()
    def decode(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [B, KV, N, D] and values [B, KV, N, Dv] of the bytes that `encode` made."""
        low, step = self._range(torch.empty(0, dtype=dtype, device=keys.device))
        k = low + self._unpack(keys).to(low.dtype) * step
        low, step = values[..., -4:].contiguous().view(torch.float16).to(low.dtype).unbind(-1)
        v = low[..., None] + self._unpack(values[..., :-4]).to(low.dtype) * step[..., None]
        return k.to(dtype), v.to(dtype)

    def encode_state(self, state: NearState) -> NearState:
        """The state with its pairs as bytes."""
        return _with_pairs(state, self.encode)

    def decode_state(self, state: NearState, dtype: torch.dtype) -> NearState:
        """The state with its pairs in `dtype`."""
        return _with_pairs(state, lambda k, v: self.decode(k, v, dtype))

    def key_steps(self) -> tuple[Tensor, Tensor]:
        """Least number and step of each channel of the keys, [KV, D] float32."""
        low, step = self._range(torch.empty(0, dtype=torch.float32))
        return low[:, 0], step[:, 0]

    def _range(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Least number and step of each channel, [KV, 1, D]."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        low, high = (x.to(dtype)[:, None] for x in (self.low, self.high))
        return low, ((high - low) / self.levels).clamp_min(1e-8)

    @torch.no_grad()
    def _spread(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Least number and step of each token, [B, KV, N, 1], as float16 holds them."""
        wide = _wide(v)
        low = wide.amin(-1, keepdim=True).to(torch.float16)
        step = (wide.amax(-1, keepdim=True) - low.to(wide.dtype)) / self.levels
        return low.to(wide.dtype), step.to(torch.float16).clamp_min(1e-7).to(wide.dtype)

    def _pack(self, code: Tensor) -> Tensor:
        code = code.to(torch.uint8)
        return code if self.bits == 8 else code[..., ::2] | (code[..., 1::2] << 4)

    def _unpack(self, packed: Tensor) -> Tensor:
        return packed if self.bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


@torch.no_grad()
def key_range(k: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Range of each channel of keys [B, KV, N, D]: of several shrunken ones the one of the smallest squared error.

    Returns:
        low and high, [KV, D] float32.
    """
    flat = k.float().transpose(0, 1).flatten(1, 2)  # [KV, B N, D]
    low, high = flat.amin(1), flat.amax(1)
    middle, half = (low + high) / 2, (high - low).clamp_min(1e-6) / 2
    tried = [PairCodec(bits, middle - half * s, middle + half * s) for s in SHRINKS]
    errors = torch.stack([(t.round_keys(flat[None])[0] - flat).square().mean(1) for t in tried])
    best = torch.tensor(SHRINKS, device=k.device)[errors.argmin(0)]
    return middle - half * best, middle + half * best


def _with_pairs(state: NearState, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> NearState:
    """The state with all its keys and values changed."""
    ring, sinks, kept = state.ring, state.sinks, state.kept
    return NearState(
        NearRing(*change(ring.k, ring.v), ring.score),
        None if sinks is None else SinkKeys(*change(sinks.k, sinks.v)),
        None if kept is None else KeptPairs(*change(kept.k, kept.v), kept.score, kept.position),
        state.length,
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rounded(x: Tensor) -> Tensor:
    """x rounded, with the gradient of x."""
    return x + (x.round() - x).detach()
