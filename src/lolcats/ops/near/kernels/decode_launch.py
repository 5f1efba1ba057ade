"""Launches the kernels of a decoding step (`decode.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lolcats.ops.devices import device_of
from lolcats.ops.hybrid.kernels.launch import SMALLEST, either, next_power, on, padded, pieces, precision
from lolcats.ops.hybrid.layout import ROWS_APART, contiguous_rows
from lolcats.ops.near.kernels.decode import near_begin, near_decode, near_finish
from lolcats.ops.near.kernels.launch import refusal
from lolcats.ops.near.quantize import PairCodec, spread
from lolcats.ops.near.types import NearPart

LARGEST_PAIRS = 4096
"""Scores of kept pairs that a program holds in registers."""
KEYS, CODED_KEYS = 64, 32
"""Slots of a tile; fewer where bytes go into products as they are (all numbers here were measured on an H200)."""
CODED_WARPS, FEW_WARPS, WARPS = 1, 2, 4
"""Of a program of `near_decode`: one for such bytes, few where it has several tiles of more than 64 numbers. Loads in
stages, which need copies of 4 bytes each, take four times as long."""
FEW_QUERIES = 8
"""Columns of a product on the tensor cores."""
PROGRAMS = 800
"""That a kernel is cut into where there is enough to do: some for each multiprocessor of a large GPU."""
LARGEST_PART, MOST_PARTS = 8, 32
"""Tiles of a program at most, unless a head had more than so many programs."""
JOINED = 8
"""Programs of a head that are joined at once."""
KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.uint8: tl.uint8}


def refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[NearPart],
    in_pool: bool,
    sink_logits: Tensor | None,
    codec: PairCodec | None = None,
) -> str | None:
    """Why `decode_step` does not take a call, whose k and v may not be coded yet, or None."""
    numbers = (q, k, v)
    if codec is not None and v.dtype == torch.uint8:
        numbers = q, q, q[..., :1].expand(*q.shape[:3], codec.value_size(v.shape[3]))
    if (reason := refusal(*numbers, False, sink_logits)) is not None:
        return reason
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, sink_logits) if x is not None):
        return "it gives no gradients; decode under torch.no_grad()"
    if codec is None and q.dtype != v.dtype:
        return f"it takes queries and values of one dtype; got {q.dtype} and {v.dtype}"
    for part in parts:
        kept = part.state.kept
        if kept is not None and kept.score.dtype != torch.float32:
            return f"it takes scores of float32 in the state; got {kept.score.dtype}"
        if kept is not None and kept.score.shape[2] > LARGEST_PAIRS:
            return f"it takes up to {LARGEST_PAIRS} kept pairs; got {kept.score.shape[2]}"
        if in_pool and not all(contiguous_rows(t) for t in part.state.tensors()):
            return ROWS_APART
    return None


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[NearPart],
    score: Tensor | None = None,
    active: Tensor | None = None,
    sink_logits: Tensor | None = None,
    state_indices: Tensor | None = None,
    codec: PairCodec | None = None,
    sink_q: Tensor | None = None,
    mapped: bool = False,
) -> Tensor:
    """`near_step` of all key heads, with contiguous rows in their states, which are changed in place.

    Args:
        q: [B, H, 1, D]; k: [B, KV, 1, D]; v: [B, KV, 1, Dv]. With a codec k and v are bytes, as it encodes them.
        parts: the key heads by their sizes, all KV of them.
        score: [B, KV, 1], with kept pairs.
        mapped: q and sink_q are as the codec maps them.
        active, sink_logits, state_indices, codec, sink_q: as in `near_step`.

    Returns:
        The output [B, H, 1, Dv].
    """
    dv = v.shape[3] if codec is None else codec.value_size(v.shape[3])
    if codec is not None and not mapped:
        q = codec.map_queries(q)
        sink_q = None if sink_q is None else codec.map_queries(sink_q)
    q, k, v = (x if x.stride(-1) == 1 and x.data_ptr() % 4 == 0 else _own(x) for x in (q, k, v))
    make = torch.empty if active is None and state_indices is None else torch.zeros
    out = make(*q.shape[:3], dv, dtype=q.dtype, device=q.device)
    score = None if score is None else score.float().contiguous()
    # `active` is often a column of a wide mask.
    active, indices = (None if x is None else x.contiguous() for x in (active, state_indices))
    sink_q = None if sink_q is None else sink_q.to(q.dtype).contiguous()
    mixes = codec is not None and dv == _wide(dv)  # a size that the last kernel can mix back by itself
    with device_of(v):
        _launch(_Step(q, k, v, score, active, indices, sink_q, sink_logits, out), parts, codec, mixes)
    return out if codec is None or mixes else spread(out.float()).to(out.dtype)


class _Step(NamedTuple):
    """What the kernels read of a token, ready for them, and where the output goes."""

    q: Tensor
    k: Tensor
    v: Tensor
    score: Tensor | None
    active: Tensor | None
    indices: Tensor | None
    sink_q: Tensor | None
    sink_logits: Tensor | None
    out: Tensor


def _launch(x: _Step, parts: Sequence[NearPart], codec: PairCodec | None, mixes: bool) -> None:
    """The three kernels, see `decode.py`."""
    (batch, heads, _, size), kv_heads, dv = x.q.shape, x.k.shape[1], x.out.shape[3]
    spec, group = parts[0].spec, heads // kv_heads
    codes = _by_codes(codec, x.q, dv)
    tile = CODED_KEYS if codes else KEYS
    part, splits = _cut(parts, batch, tile)
    sums, tops = (x.q.new_empty(batch * kv_heads * splits * group, n, dtype=torch.float32) for n in (dv, 2))
    changes = x.q.new_empty(batch * kv_heads, 3, dtype=torch.int32)
    table = head_table(parts, x.q.device)
    rows, few = (either(x.active, x.q), either(x.indices, x.q), table), next_power(group)
    strides = x.k.stride(0), x.k.stride(1), x.v.stride(0), x.v.stride(1)
    flags = {
        "KV_HEADS": kv_heads, "SINKS": spec.sinks, "HAS_PAIRS": any(part.spec.pairs for part in parts),
        "HAS_ACTIVE": x.active is not None, "HAS_INDICES": x.indices is not None, "K": tile,
    }  # fmt: skip
    both = flags | {
        "GROUP": group, "DV": dv, "BV": _wide(dv), "WK": x.k.shape[3], "WV": x.v.shape[3],
        "KIND": KINDS[parts[0].state.ring.k.dtype],
    }  # fmt: skip
    most = padded(max(part.spec.pairs for part in parts))
    on(near_begin, (batch, kv_heads))(*rows, changes, BP=most, **flags, num_warps=2)
    on(near_decode, (batch, kv_heads, splits))(
        x.q, x.k, x.v, either(x.sink_q, x.q), *rows, sums, tops, changes, x.q.stride(0), x.q.stride(1), *strides,
        spec.reach or 0, spec.product_scale(size), part, splits, **_of_decode(x, parts, codec, codes, part > 1), **both,
    )  # fmt: skip
    on(near_finish, (batch, kv_heads))(
        x.k, x.v, either(x.score, tops), either(x.sink_logits, x.q), *rows, sums, tops, changes, x.out, *strides, part,
        splits, BG=few, BWK=padded(x.k.shape[3]), BWV=padded(x.v.shape[3]), LEARNED=x.sink_logits is not None,
        LEVELS=dv.bit_length() - 1 if mixes else 0, FACTOR=dv**-0.5, J=max(1, min(JOINED, 4096 // (few * _wide(dv)))),
        num_warps=4, **both,
    )  # fmt: skip


def _of_decode(
    x: _Step, parts: Sequence[NearPart], codec: PairCodec | None, codes: bool, several: bool
) -> dict[str, Any]:
    """What `near_decode` is compiled for beside its sizes; `several`: a program has more than one tile."""
    spec, size, group = parts[0].spec, x.q.shape[3], x.q.shape[1] // x.k.shape[1]
    aligned, warps = codec is None and _aligned(parts), FEW_WARPS if size > 64 and several else WARPS
    return {
        "BG": max(FEW_QUERIES, next_power(group)) if codes else padded(group), "D": size, "BD": _wide(size),
        "BITS": 16 if codec is None else codec.bits, "WIDE": 0 if codec is None else codec.wide(size),
        "BS": padded(spec.sinks), "SOFTCAP": float(spec.softcap or 0.0), "HAS_SINK_Q": x.sink_q is not None,
        "HAS_REACH": spec.reach is not None, "PRECISION": precision(x.q.dtype), "ALIGNED": aligned, "CODES": codes,
        "STAGES": 3 if aligned and x.q.element_size() == 2 else 1,
        "num_warps": CODED_WARPS if codes else warps,
    }  # fmt: skip


def _wide(size: int) -> int:
    """Numbers of a head in a tile."""
    return max(SMALLEST, padded(size))


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _cut(parts: Sequence[NearPart], batch: int, tile: int) -> tuple[int, int]:
    """Tiles of a program, and programs of the largest key head."""
    tiles = [pieces(part.spec.pairs, tile) + pieces(part.spec.window, tile) for part in parts for _ in part.heads]
    part = max(1, min(LARGEST_PART, batch * sum(tiles) // PROGRAMS), pieces(max(tiles), MOST_PARTS))
    return part, pieces(max(tiles), part)


def _by_codes(codec: PairCodec | None, q: Tensor, dv: int) -> bool:
    """Whether rows are read as words whose bytes go into products of 16 bits as they are."""
    return codec is not None and codec.bits == 8 and q.element_size() == 2 and q.shape[3] % 4 == dv % 4 == 0


def _aligned(parts: Sequence[NearPart]) -> bool:
    """Whether keys and values can be read many numbers at a time."""
    stored = [x for part in parts for x in (*part.state.ring[:2], *(part.state.kept or ())[:2])]
    return all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[3] % 16 == 0 for x in stored)


def head_table(parts: Sequence[NearPart], device: torch.device) -> Tensor:
    """Where the tensors of each key head lie, and its sizes: [KV, `COLUMNS`] int64.

    It is kept with the first of the tensors that it names: as long as these are where they are, no step makes it anew,
    and a recorded step has it in the same place.
    """
    rows = [_table_row(part) for part in parts]
    key = [*rows, [part.heads for part in parts]]
    holder = parts[0].state.ring.k
    held = getattr(holder, "_head_table", None)
    if held is None or held[0] != key or held[1].device != device:
        by_head = {head: [*row, i] for part, row in zip(parts, rows, strict=True) for i, head in enumerate(part.heads)}
        table = torch.tensor([by_head[head] for head in range(len(by_head))], dtype=torch.int64)
        held = holder._head_table = (key, table.to(device))  # type: ignore[attr-defined]
    return held[1]


def _table_row(part: NearPart) -> list[int]:
    state = part.state
    none = (None,) * 4
    tensors = (*state.ring, *(state.kept or none), *(state.sinks or none[:2]), state.length)
    places = [0 if x is None else x.data_ptr() for x in tensors]
    return [*places, *(0 if x is None else x.stride(0) for x in tensors), part.spec.window, part.spec.pairs]
