"""How a call is cut, and the launches of the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.devices import capability
from lolcats.ops.hybrid.kernels.forward import forward_kernel
from lolcats.ops.hybrid.kernels.states import scan_segments, sum_segments
from lolcats.ops.hybrid.kernels.tiles import GIVEN, HEDGEHOG, T2R
from lolcats.ops.types import HybridSpec

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

BLOCK, TILE = 64, 128
"""Tokens of a block, C, and of a tile, T."""
SUM_PROGRAMS = 264
"""Programs that sum states at once: two for each multiprocessor of an H100."""
SMALLEST = 64
"""Rows of a product on the tensor cores: with less Triton 3.6 was seen to give wrong numbers on an H100."""
KINDS = {"given": GIVEN.value, "hedgehog": HEDGEHOG.value, "t2r": T2R.value}


class Operands(NamedTuple):
    """Tensors of one call. q [B, H, N, D], k [B, KV, N, D], v [B, KV, N, Dv], last dimension contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    map_q: Tensor
    """Features [B, H, N, F], or weights [H, D, width] of the feature map."""
    map_k: Tensor
    """Features [B, H or KV, N, F], or weights [H or KV, D, width]."""
    window_factor: Tensor
    """[H]."""
    bias_q: Tensor | None = None
    """[H, width], t2r only."""
    bias_k: Tensor | None = None
    """[H or KV, width], t2r only."""
    factor: Tensor | None = None
    """[H]: the query features are multiplied by exp(factor)."""
    sink_logits: Tensor | None = None
    """[H]."""
    log_decay: Tensor | None = None
    """[B, H, N] fp32."""


class Context(NamedTuple):
    """What a call needs beside the operands, without gradients."""

    rows: Tensor | None = None
    """[R, 4] int32: batch entry, first token, tokens, position of the first token; None: one row a batch entry."""
    longest: int = 0
    """Tokens of the longest row; 0: all of them."""
    initial: Tensor | None = None
    """[R, SH, F Dv + F] fp32: linear state before the first token."""
    sink_k: Tensor | None = None
    """[R, KV, s, D]: sinks that are not the first tokens of their row."""
    sink_v: Tensor | None = None
    """[R, KV, s, Dv]."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one call and how it is cut."""

    kind: str
    spec: HybridSpec
    batch: int
    heads: int
    kv_heads: int
    map_heads: int  # heads of map_k, and linear states of the forward pass
    tokens: int
    rows: int
    d: int
    dv: int
    width: int  # columns of a map's weights; of given features F
    f: int
    reach: int
    first: int
    mixed: int
    longest: int  # tokens of the longest row
    tma: bool  # tiles come through descriptors
    lowered: bool  # 16-bit operands

    @property
    def groups(self) -> int:
        """Tiles, and stored states, of a row and head."""
        return pieces(self.longest, TILE)

    @property
    def blocks(self) -> int:
        """Blocks of a row and head."""
        return pieces(self.longest, BLOCK)

    @property
    def parts(self) -> int:
        """Parts of a state: the halves of a hedgehog map."""
        return self.f // self.width

    @property
    def stages(self) -> int:
        """Tiles of a loop that are on their way at once.

        Two where two programs still share a multiprocessor, but with heads of 64, where it was seen to be slower.
        """
        return 2 if self.tma and self.lowered and 64 < max(self.d, self.dv) <= 128 and self.width <= 128 else 1

    def segments(self, heads: int) -> tuple[int, int]:
        """Groups a segment, and segments, when there is a state for each of `heads` heads."""
        wanted = max(1, min(self.groups, SUM_PROGRAMS // (self.rows * heads * self.parts)))
        size = pieces(self.groups, wanted)
        return size, pieces(self.groups, size)

    def sizes(self) -> dict[str, Any]:
        """Sizes of tiles."""
        return {
            "D": self.d,
            "BD": max(SMALLEST, padded(self.d)),
            "WIDTH": self.width,
            "F": self.f,
            "BF": max(SMALLEST, padded(self.width)),
            "DV": self.dv,
            "BV": max(SMALLEST, padded(self.dv)),
            "MAP": KINDS[self.kind],
            "C": BLOCK,
            "T": TILE,
            "TMA": self.tma,
        }

    def tokens_of(self, x: Tensor) -> Any:
        """x [B, heads, N, size] as kernels take it."""
        return described(x, [1, 1, BLOCK, max(SMALLEST, padded(x.shape[3]))]) if self.tma else x

    def values_of(self, x: Tensor, block: int) -> Any:
        """Values [B, heads, N, Dv] of which a program takes `block` columns."""
        return described(x, [1, 1, BLOCK, block]) if self.tma else x

    def map_of(self, x: Tensor) -> Any:
        """Features, or weights [heads, D, width] of a map."""
        if self.kind == "given":
            return self.tokens_of(x)
        return described(x, [1, *(max(SMALLEST, padded(size)) for size in x.shape[1:])]) if self.tma else x

    def state_of(self, x: Tensor, block: int) -> Any:
        """States [..., width, Dv] of which a program takes `block` columns."""
        shape = [1, max(SMALLEST, padded(self.width)), block]
        return described(x.view(-1, self.width, self.dv), shape) if self.tma else x

    def softmax(self) -> dict[str, Any]:
        """What the softmax half is."""
        s = self.spec
        return {"SOFTCAP": float(s.softcap or 0.0), **self.window()}

    def window(self) -> dict[str, Any]:
        """Which pairs are near."""
        s = self.spec
        return {
            "REACH": self.reach,
            "WINDOW": s.window,
            "TERRACED": s.window_kind == "terraced",
            "SINKS": s.sinks,
            "KV_GROUP": self.heads // self.kv_heads,
            "HEADS": self.heads,
        }


def pieces(count: int, size: int) -> int:
    """How many of `size` there are in `count`, the last one perhaps not whole.

    Not by Triton's functions, here and below: they prepare for code that is being compiled, which takes microseconds.
    """
    return -(-count // size)


def next_power(size: int) -> int:
    """The smallest power of 2 that is not less than `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """Size of a tile that holds `size`."""
    return max(16, next_power(size))


def described(x: Tensor, block: list[int]) -> Any:
    """A descriptor of x for tiles of the shape `block`."""
    assert TensorDescriptor is not None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def can_describe(*tensors: Tensor) -> bool:
    """Whether the copy engine takes tensors: Hopper and later, not expanded, addresses and strides of 16-byte units."""
    if TensorDescriptor is None:
        return False
    device = tensors[0].device
    if device.type == "cuda" and capability(device) < (9, 0):
        return False
    return all(
        x.data_ptr() % 16 == 0 and all(step > 0 and step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        for x in tensors
    )


def make_plan(x: Operands, context: Context, spec: HybridSpec, kind: str) -> Plan:
    """How a call is cut into blocks, groups and segments.

    Rows of packed texts come through pointers: a descriptor's tile would hold tokens of the next text.
    """
    batch, heads, n, d = x.q.shape
    width = x.map_q.shape[-1]
    map_heads = x.map_k.shape[1] if kind == "given" else x.map_k.shape[0]
    assert x.log_decay is None or map_heads == heads, "decay needs a map of the keys for each query head"
    rows = batch if context.rows is None else context.rows.shape[0]
    tma = context.rows is None and x.v.shape[3] % 8 == 0 and can_describe(*x[:5])
    return Plan(
        kind, spec, batch, heads, x.k.shape[1], map_heads, n, rows, d, x.v.shape[3], width,
        2 * width if kind == "hedgehog" else width, *reach_of(spec, context.rows is None), context.longest or n, tma,
        x.v.element_size() == 2,
    )  # fmt: skip


def reach_of(spec: HybridSpec, aligned: bool) -> tuple[int, int, int]:
    """REACH, FIRST and MIXED: where softmax pairs and linear pairs can be (tiles.py).

    `aligned`: rows begin at position 0. Where whole blocks then make up a terraced window's own, the first of these is
    as near to its last query as a block can be, so that a third of the blocks in reach drops out (window 64).
    """
    window, terraced = spec.window, spec.window_kind == "terraced"
    if terraced and aligned and window % BLOCK == 0:
        own = window // BLOCK
        return 2 * own - 1, own + 1, -own
    furthest = 2 * window if terraced else window  # softmax pairs are less than this apart
    nearest = window + 1 if terraced else window  # linear pairs are at least this apart
    reach = max(0, -(-(furthest - 1) // BLOCK))
    first = max(0, -(-(nearest - BLOCK + 1) // BLOCK))
    return reach, first, 1 - first


class States(NamedTuple):
    """What `states.load_state` reads: see states.py for the shapes."""

    local: Tensor
    local_sum: Tensor
    local_decay: Tensor
    before: Tensor
    before_sum: Tensor
    segment: int
    segments: int
    split: bool

    def pointers(self, plan: Plan, block: int) -> tuple[Any, ...]:
        """Arguments of a kernel that takes `block` columns of a state."""
        return plan.state_of(self.local, block), *self[1:3], plan.state_of(self.before, block), self.before_sum


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    out: Tensor
    inverse: Tensor
    maximum: Tensor
    states: States | None
    sink_k: Tensor | None
    sink_v: Tensor | None


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 operands are made: three tf32 products, as exact as fp32."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token."""
    return x.stride(0), x.stride(1), x.stride(2)


def feature_strides(p: Plan, x: Operands) -> tuple[int, ...]:
    """Strides of batch and head of given features of queries and keys."""
    if p.kind != "given":
        return 0, 0, 0, 0
    return *x.map_q.stride()[:2], *x.map_k.stride()[:2]


def on(kernel: Any, grid: tuple[int, ...]) -> Any:
    """The kernel on a grid of programs, to be called."""
    return kernel[grid]


def either(x: Tensor | None, other: Tensor) -> Tensor:
    """A tensor for a pointer that is not read."""
    return other if x is None else x


def flags(x: Operands, c: Context) -> dict[str, bool]:
    """Which optional operands there are."""
    return {"HAS_DECAY": x.log_decay is not None, "HAS_ROWS": c.rows is not None, "HAS_FACTOR": x.factor is not None}


def sum_states(
    p: Plan, x: Operands, c: Context, values: Tensor, terms: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
) -> tuple[States, Tensor | None]:  # fmt: skip
    """The states of a pass: backward with `terms` (1 / denominator and do.o), else forward.

    With `keep` [B, N] only the keys counted there are summed, and the sum over all of them [R, heads, F Dv + F] is
    returned as well.
    """
    reverse = terms is not None
    heads = p.heads if reverse else p.map_heads
    groups = p.groups
    segment, segments = p.segments(heads)
    device, numbers = x.q.device, p.f * (p.dv + 1)
    low = torch.bfloat16 if values.dtype == torch.float16 else values.dtype

    def fp32(*shape: int) -> Tensor:
        return torch.empty(p.rows, heads, *shape, dtype=torch.float32, device=device)

    local = torch.empty(p.rows, heads, groups, p.f * p.dv, dtype=low, device=device)
    local_sum, local_decay = fp32(groups, p.f), fp32(groups if x.log_decay is not None else 1)
    sums, decays = fp32(segments, numbers), fp32(segments)
    given = p.kind == "given"
    source = (x.map_q if given else x.q) if reverse else (x.map_k if given else x.k)
    inverse, delta = terms or (sums, sums)
    weight, bias = (x.map_q, x.bias_q) if reverse else (x.map_k, x.bias_k)
    value_block = min(max(SMALLEST, padded(p.dv)), 128 if padded(p.width) <= 128 else 64)
    reach = p.reach if keep is None else 0
    on(sum_segments, (heads * p.parts, segments, p.rows * pieces(p.dv, value_block)))(
        p.tokens_of(source), p.values_of(values, value_block), sums if given else p.map_of(weight), either(bias, sums),
        either(x.factor, sums), inverse, delta, either(x.log_decay, sums), either(keep, sums), either(c.rows, sums),
        p.state_of(local, value_block), local_sum, local_decay, sums, decays, *strides(source), *strides(values),
        p.tokens, segments, groups, segment,
        REVERSE=reverse, X_GROUP=1 if reverse or given else heads // p.kv_heads,
        V_GROUP=1 if reverse else heads // p.kv_heads, REACH=reach, HEADS=heads, SINKS=p.spec.sinks,
        **{**p.sizes(), "BV": value_block},
        **{**flags(x, c), "HAS_FACTOR": reverse and x.factor is not None}, HAS_KEEP=keep is not None,
        PRECISION=precision(values.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    initial = None if reverse else c.initial
    split = segments > 1 or initial is not None
    before = torch.empty(p.rows, heads, segments, p.f * p.dv, dtype=low, device=device) if split else local
    final = fp32(numbers) if keep is not None else None
    if split or keep is not None:
        on(scan_segments, (p.rows * heads, pieces(numbers, 512)))(
            sums, before if split else torch.empty_like(sums), decays, either(initial, sums), either(final, sums),
            segments, numbers, p.f * p.dv, REVERSE=reverse, HAS_DECAY=x.log_decay is not None,
            HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return States(local, local_sum, local_decay, before, sums, segment, segments, split), final


def state_arguments(
    p: Plan, states: States | None, other: Tensor, block: int
) -> tuple[tuple[Any, ...], tuple[int, int, int], dict[str, Any]]:
    """Pointers, sizes and constants for a kernel that reads states."""
    if states is None:
        return (other,) * 5, (1, 1, 1), {"HAS_STATES": False, "SPLIT": False}
    numbers = states.segments, p.groups, states.segment
    return states.pointers(p, block), numbers, {"HAS_STATES": True, "SPLIT": states.split}


def run_forward(p: Plan, x: Operands, c: Context, save: bool) -> Saved:
    """Output [B, H, N, Dv] and, with `save`, what the backward pass needs."""
    dtype, device = x.v.dtype, x.q.device
    # In the layout that the layer's output projection wants: no copy is needed there.
    out = torch.empty(p.batch, p.tokens, p.heads, p.dv, dtype=dtype, device=device).transpose(1, 2)
    if c.rows is not None:
        out.zero_()
    shape = (p.batch, p.heads, p.tokens) if save else (1,)
    inverse, maximum = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    states = sum_states(p, x, c, x.v)[0] if p.groups > 1 or c.initial is not None else None
    sink_k, sink_v = _sinks(p, x, c)
    value_block = min(max(SMALLEST, padded(p.dv)), 128 if padded(p.f) <= 256 else 64)
    pointers, numbers, constants = state_arguments(p, states, inverse, value_block)
    on(forward_kernel, (p.heads, p.blocks, p.rows * pieces(p.dv, value_block)))(
        p.tokens_of(x.q), p.tokens_of(x.k), p.values_of(x.v, value_block), p.map_of(x.map_q), p.map_of(x.map_k),
        either(x.bias_q, x.q), either(x.bias_k, x.q), either(x.factor, x.q), x.window_factor,
        either(x.sink_logits, x.q), either(x.log_decay, inverse), either(sink_k, x.q),
        either(sink_v, x.q), *pointers, either(c.rows, x.q), out, inverse, maximum,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(out), *feature_strides(p, x), p.tokens, *numbers,
        p.spec.score_scale(p.d),
        STATE_GROUP=p.heads // p.map_heads, MAP_GROUP=p.heads // p.map_heads, BS=padded(p.spec.sinks),
        **flags(x, c), LEARNED=x.sink_logits is not None, SAVE=save, PRECISION=precision(dtype), **constants,
        **p.softmax(), **{**p.sizes(), "BV": value_block}, MIXED=p.mixed, STAGES=p.stages, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Saved(out, inverse, maximum, states, sink_k, sink_v)


def _sinks(p: Plan, x: Operands, c: Context) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values [R, KV, s, .] of the sinks."""
    s = p.spec.sinks
    if s == 0:
        return None, None
    if c.sink_k is not None and c.sink_v is not None:
        return c.sink_k.contiguous(), c.sink_v.contiguous()
    if c.rows is None:
        pad = (0, 0, 0, max(0, s - p.tokens))
        return nnf.pad(x.k[:, :, :s], pad).contiguous(), nnf.pad(x.v[:, :, :s], pad).contiguous()
    batch, start = c.rows[:, 0].long(), c.rows[:, 1].long()
    index = (start[:, None] + torch.arange(s, device=start.device)).clamp(max=p.tokens - 1)
    sink_k, sink_v = (t[batch[:, None], :, index].transpose(1, 2).contiguous() for t in (x.k, x.v))
    return sink_k, sink_v
