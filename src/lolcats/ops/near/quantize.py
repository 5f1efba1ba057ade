"""Window and kept pairs in 8 or 4 bits, token by token: no range belongs to a layer, so no key can leave it.

A token's numbers are coded after a Hadamard matrix, which spreads what a few channels hold over all of them, as one of
2^b levels times a step, a float16 that is stored with the token:

    number = step level(code),    level(c) = u (1 + a u^2),  u = c - (2^b - 1) / 2,  a = 0.008 at 4 bits, else 0

(The matrix makes numbers nearly Gaussian, and levels that lie further apart outside suit these: a sixth less squared
error than evenly spaced ones.) Keys are multiplied before by a number for each channel, and queries divided by it.
With 4 bits the quarter of a key's channels that scores depend on most keeps 8 bits, no matrix and a step of its own.
Order and scale of the channels belong to the layer; both are the same for channels that rotary embedding turns into
each other, so they fit every position. Attention sees rounded pairs everywhere, so a text is the same read at once and
token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.hybrid.api import kernels_available
from lolcats.ops.near.types import OCTAVE, STEP_BYTES, Coded, KeptPairs, NearRing, NearState
from lolcats.ops.types import SinkKeys

BITS = (4, 8)
CURVE = 0.008
"""a of 4 bits."""
STEPS = (1.2, 1.05, 0.95, 0.85, 0.75)
"""Steps that are tried with 4 bits, as parts of the one whose last level is a token's largest number."""


def plain_map(kv_heads: int, size: int, device: torch.device | str | None = None) -> Tensor:
    """The map of keys of which nothing is known: [2, KV, D] int16, as `measure_keys` makes it."""
    order = torch.arange(size, dtype=torch.int16, device=device).expand(kv_heads, size)
    return torch.stack([order, torch.zeros_like(order)])


@torch.no_grad()
def measure_keys(q: Tensor, k: Tensor, partners: Tensor) -> Tensor:
    """Which channels matter most to scores, and how to scale them.

    Args:
        q: [B, H, N, D]; k: [B, KV, N, D].
        partners: [D], of each channel the one that the rotary embedding turns into it; itself where none does.

    Returns:
        [2, KV, D] int16: the channels, falling in E[q^2] E[k^2], and log2 of (E[q^2] / E[k^2])^(1/4), 16 to the
        octave, of each channel. The noise of rounding is the same in all coded numbers, so this scale makes the sum of
        its products with queries least.
    """
    kv_heads = k.shape[1]
    of_k = k.float().square().mean((0, 2))
    of_q = q.float().square().mean((0, 2)).unflatten(0, (kv_heads, -1)).mean(1)
    of_q, of_k = ((x + x[:, partners]).clamp_min(1e-12).log2() for x in (of_q, of_k))
    order = (of_q + of_k).argsort(dim=-1, descending=True, stable=True)
    scale = ((of_q - of_k) / 4 * OCTAVE).round().clamp(-16 * OCTAVE, 16 * OCTAVE)
    return torch.stack([order, scale]).to(torch.int16)


class PairCodec(NamedTuple):
    """How pairs become bytes."""

    bits: int
    """4 or 8."""
    key_map: Tensor
    """[2, KV, D], see `measure_keys`."""

    def wide(self, size: int) -> int:
        """Channels of keys of `size` numbers that have 8 bits where the others have 4."""
        return 0 if self.bits == 8 else size // 8 * 2

    def key_bytes(self, size: int) -> int:
        """Of a key of `size` numbers."""
        wide = self.wide(size)
        return wide + (size - wide) * self.bits // 8 + STEP_BYTES * (1 + (wide > 0))

    def value_size(self, stored: int) -> int:
        """Numbers of a value of so many bytes."""
        return (stored - STEP_BYTES) * 8 // self.bits

    def map_keys(self, k: Tensor) -> Tensor:
        """Keys [B, KV, N, D] as they are coded: scaled, in their order, the channels without 8 bits mixed."""
        return self._mixed(self._ordered(k))

    def map_queries(self, q: Tensor) -> Tensor:
        """Queries [B, H, N, D] whose products with mapped keys are those of q with the keys, in their dtype."""
        grouped = q.unflatten(1, (self.key_map.shape[1], -1))
        order, scale = (x[:, None] for x in self._key_map(q))
        return self._mixed((_wide(grouped) / scale).gather(-1, order.expand_as(grouped))).flatten(1, 2).to(q.dtype)

    def coded(self, k: Tensor, v: Tensor, store: bool) -> Coded:
        """Keys [B, KV, N, D] and values [B, KV, N, Dv] as they are when read again; with `store` their bytes too."""
        with torch.no_grad():
            done = self._by_kernel(k.detach(), v.detach(), store) or self._in_torch(k, v, store)
        return done._replace(k=_with_gradient(done.k, k), v=_with_gradient(done.v, v))

    def _in_torch(self, k: Tensor, v: Tensor, store: bool) -> Coded:
        """`coded` without gradients, in the dtype that it is computed in."""
        parts, (code, step) = self._coded_keys(k), _coded(spread(_wide(v.detach())), self.bits)
        rounded_k = self._keys(torch.cat([_level(code, bits) * step for code, bits, step in parts], -1))
        rounded_v = spread(_level(code, self.bits) * step)
        keys = self._key_stored(parts) if store else None
        return Coded(rounded_k, rounded_v, keys, _stored(code, step, self.bits) if store else None)

    @torch.no_grad()
    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of keys [B, KV, N, `key_bytes`] and values [B, KV, N, Dv b/8 + 2], steps last."""
        if self.bits == 8 and k.shape == v.shape and k.shape[2] == 1:  # a decoding step: one small kernel for both
            both = spread(torch.cat([self._ordered(k), _wide(v)], 1))
            keys, values = _stored(*_coded(both, self.bits), self.bits).chunk(2, 1)
            return keys.contiguous(), values.contiguous()
        return self._key_stored(self._coded_keys(k)), _stored(*_coded(spread(_wide(v)), self.bits), self.bits)

    @torch.no_grad()
    def decode(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [B, KV, N, D] and values [B, KV, N, Dv] of the bytes that `encode` made."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        size = self.key_map.shape[-1]
        wide = self.wide(size)
        parts = [(keys[..., wide : wide + (size - wide) * self.bits // 8], self.bits, keys[..., -STEP_BYTES:])]
        if wide:
            parts = [(keys[..., :wide], 8, keys[..., -2 * STEP_BYTES : -STEP_BYTES]), *parts]
        numbers = [_level(_unpack(code, bits).to(exact), bits) * _read_step(step, exact) for code, bits, step in parts]
        code, step = _unpack(values[..., :-STEP_BYTES], self.bits), _read_step(values[..., -STEP_BYTES:], exact)
        v = spread(_level(code.to(exact), self.bits) * step)
        return self._keys(torch.cat(numbers, -1)).to(dtype), v.to(dtype)

    def encode_state(self, state: NearState) -> NearState:
        """The state with its pairs as bytes."""
        return _with_pairs(state, self.encode)

    def encode_empty(self, state: NearState) -> NearState:
        """The same of a state whose pairs are all 0; its tensors may share memory, to be read alone."""
        zeros = (x.new_zeros(1, x.shape[1], 1, x.shape[3]) for x in state.ring[:2])
        key, value = self.encode(*zeros)
        return _with_pairs(state, lambda k, v: (key.expand(*k.shape[:3], -1), value.expand(*v.shape[:3], -1)))

    def decode_state(self, state: NearState, dtype: torch.dtype) -> NearState:
        """The state with its pairs in `dtype`."""
        return _with_pairs(state, lambda k, v: self.decode(k, v, dtype))

    def _by_kernel(self, k: Tensor, v: Tensor, store: bool) -> Coded | None:
        """`coded`, to the bit, where a kernel does it."""
        if self.bits != 8 or torch.compiler.is_compiling() or not kernels_available(k.device):
            return None
        from lolcats.ops.near.kernels.pairs import code_pairs, codes_pairs  # not at the top: see `spread`

        return code_pairs(k, v, self.key_map, store) if codes_pairs(k, v) else None

    def _coded_keys(self, k: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """Code, bits and step of the channels of 8 bits, if there are such, and of the others."""
        mapped, wide = self.map_keys(k.detach()), self.wide(k.shape[-1])
        parts = [(mapped[..., wide:], self.bits)]
        if wide:
            parts = [(mapped[..., :wide], 8), *parts]
        return [(code, bits, step) for x, bits in parts for code, step in (_coded(x, bits),)]

    @staticmethod
    def _key_stored(parts: list[tuple[Tensor, int, Tensor]]) -> Tensor:
        """Bytes of what `_coded_keys` gives."""
        return torch.cat(
            [*(_pack(code, bits) for code, bits, _ in parts), *(_step_bytes(step) for *_, step in parts)], -1
        )

    def _ordered(self, k: Tensor) -> Tensor:
        """Keys scaled and in their order."""
        order, scale = self._key_map(k)
        return (_wide(k) * scale).gather(-1, order.expand_as(k))

    def _keys(self, mapped: Tensor) -> Tensor:
        """`map_keys` undone."""
        order, scale = self._key_map(mapped)
        return self._mixed(mapped).gather(-1, order.argsort(-1).expand_as(mapped)) / scale

    def _mixed(self, x: Tensor) -> Tensor:
        wide = self.wide(x.shape[-1])
        return torch.cat([x[..., :wide], spread(x[..., wide:])], -1) if wide else spread(x)

    def _key_map(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Order and scale of the channels, [KV, 1, D]."""
        order, scale = self.key_map[:, :, None].unbind(0)
        return order.long(), (scale.to(_wide(like).dtype) / OCTAVE).exp2()


def spread(x: Tensor) -> Tensor:
    """x [..., n] times an orthogonal matrix that is its own inverse: Hadamard for n a power of 2, else of blocks.

    By additions whose order does not depend on the shape: a matrix product would round the same token differently in a
    text and by itself, and a code would rarely, but then visibly, be another one. On a GPU a kernel does the same
    additions, which are many small kernels otherwise.
    """
    if not torch.compiler.is_compiling() and kernels_available(x.device):
        # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
        from lolcats.ops.near.kernels.spread import spread_rows, spreads

        if spreads(x):
            return spread_rows(x)
    block = x.shape[-1] & -x.shape[-1]
    y, width = x.unflatten(-1, (block, -1)), 1  # channel c is in block c % m, so each has some of the first ones
    while width < block:
        one, two = y.unflatten(-2, (-1, 2, width)).unbind(-3)
        y = torch.stack([one + two, one - two], -3).flatten(-4, -2)
        width *= 2
    return y.flatten(-2) * block**-0.5


def _coded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of x [..., n], as numbers, and the steps [..., 1], as float16 holds them: of those tried the best."""
    half = (2**bits - 1) / 2
    step = x.abs().amax(-1, keepdim=True) / (half * (1 + _curve(bits) * half * half))
    if bits == 8:
        step = _as_float16(step)
        return (x / step + half).round().clamp(0, 2 * half), step
    # Not by a tensor of them: a copy from the host cannot be recorded as a CUDA graph.
    step = _as_float16(torch.cat([step * part for part in STEPS], -1))[..., None]  # [..., tried, 1]
    levels = _level(torch.arange(2**bits, dtype=x.dtype, device=x.device), bits)
    code = torch.bucketize((x[..., None, :] / step).contiguous(), (levels[1:] + levels[:-1]) / 2).to(x.dtype)
    error = _total((_level(code, bits) * step - x[..., None, :]).square())
    best = error.argmin(-1, keepdim=True)[..., None]  # [..., 1, 1]
    code = code.gather(-2, best.expand(*best.shape[:-1], x.shape[-1]))
    return code[..., 0, :], step.gather(-2, best)[..., 0, :]


def _level(code: Tensor, bits: int, *_: object) -> Tensor:
    u = code - (2**bits - 1) / 2
    return u * (1 + CURVE * u * u) if bits == 4 else u


def _curve(bits: int) -> float:
    return CURVE if bits == 4 else 0.0


def _total(x: Tensor) -> Tensor:
    """The sum over the last dimension, in an order that does not depend on the shape."""
    while x.shape[-1] % 2 == 0:
        one, two = x.chunk(2, -1)
        x = one + two
    total = x[..., 0]
    for i in range(1, x.shape[-1]):
        total = total + x[..., i]
    return total


def _as_float16(step: Tensor) -> Tensor:
    return step.clamp(1e-7, 6e4).to(torch.float16).to(step.dtype)


def _step_bytes(step: Tensor) -> Tensor:
    return step.to(torch.float16).view(torch.uint8)


def _read_step(stored: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy: a view of bytes that begins at an odd one cannot be read as float16, even where it is contiguous.
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16).to(dtype)


def _stored(code: Tensor, step: Tensor, bits: int) -> Tensor:
    return torch.cat([_pack(code, bits), _step_bytes(step)], -1)


def _pack(code: Tensor, bits: int) -> Tensor:
    code = code.to(torch.uint8)
    return code if bits == 8 else code[..., ::2] | (code[..., 1::2] << 4)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _with_gradient(rounded: Tensor, x: Tensor) -> Tensor:
    """What is rounded in the dtype of x, with the gradient of x."""
    rounded = rounded.to(x.dtype)
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _with_pairs(state: NearState, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> NearState:
    """The state with all its keys and values changed."""
    ring, sinks, kept = state.ring, state.sinks, state.kept
    return NearState(
        NearRing(*change(ring.k, ring.v), ring.score),
        None if sinks is None else SinkKeys(*change(sinks.k, sinks.v)),
        None if kept is None else KeptPairs(*change(kept.k, kept.v), kept.score, kept.position),
        state.length,
    )
