"""Pairs of 8 bits in softmax attention, in the tensor cores without a conversion.

A code c from 0 to 255 in the low bits of a float16 is the number c 2^-24, exactly: products take it as it is, and what
a level c - 127.5 has beside it is the same for all of a row, so it is taken off at the end:

    q.level = 2^24 q.(c 2^-24) - 127.5 sum(q),    and so for the weighted sum of values.

The four bytes of a word give even and odd columns by two masks, so a tile is two halves of its columns, and queries and
sums have the same two. Queries are divided by a power of 2 that brings a row's largest number to [1, 2): in float16
they have more bits than in bfloat16, and nothing overflows. Weights, at most 1, carry the steps of values relative to
the largest of the tile.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.ops.near.kernels.tiles import capped

UNIT = tl.constexpr(2.0**24)
"""What a code is divided by as a float16."""
MIDDLE = tl.constexpr(127.5)
BYTES = tl.constexpr(0x00FF00FF)
LANES = tl.constexpr(8)
"""Threads that read a row, each some words that lie so far apart: what a row costs beside them is paid once."""


@triton.jit
def read_float16(base, inside):
    """The float16 whose two bytes are at `base` [K] of bytes, as float32."""
    low = tl.load(base, mask=inside, other=0).to(tl.int16)
    high = tl.load(base + 1, mask=inside, other=0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def read_chunk(words, first, chunk: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """Words [K, LANES] uint32 that begin `first` [K] bytes after `words`, and `chunk` LANES words: even and odd bytes.

    A word lies in two of those in memory, or in one: then that is read twice, never one that may not be there.
    """
    column = chunk * LANES + tl.arange(0, LANES)
    shift = (first & 3) * 8
    at = words + (first >> 2)[:, None] + column[None, :]
    also = words + ((first >> 2) + (shift > 0))[:, None] + column[None, :]
    if size < block:
        low = tl.load(at, mask=(column < size // 4)[None, :], other=0)
        high = tl.load(also, mask=(column < size // 4)[None, :], other=0)
    else:
        low, high = tl.load(at), tl.load(also)
    both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    shift = shift.to(tl.uint64)[:, None]
    return (both >> shift).to(tl.uint32) & BYTES, (both >> (shift + 8)).to(tl.uint32) & BYTES


@triton.jit
def read_chunks(words, first, chunk: tl.constexpr, apart: tl.constexpr, chunks: tl.constexpr, size: tl.constexpr,
                block: tl.constexpr):  # fmt: skip
    """Chunks chunk, chunk + apart, ... of all `chunks`, word by word beside each other."""
    if chunk + apart >= chunks:
        return read_chunk(words, first, chunk, size, block)
    else:
        even, odd = read_chunks(words, first, chunk, 2 * apart, chunks, size, block)
        more_even, more_odd = read_chunks(words, first, chunk + apart, 2 * apart, chunks, size, block)
        return tl.interleave(even, more_even), tl.interleave(odd, more_odd)


@triton.jit
def columns(block: tl.constexpr):
    """The even columns [block / 2] of a row in the order in which they are read."""
    place = tl.arange(0, block // 2)
    word, chunks = place // 2, block // 4 // LANES
    return 4 * ((word % chunks) * LANES + word // chunks) + 2 * (place % 2)


@triton.jit
def as_codes(word):
    """Both halves of words [K, n] as float16 [K, 2 n]."""
    return tl.interleave(word.to(tl.uint16), (word >> 16).to(tl.uint16)).to(tl.float16, bitcast=True)


@triton.jit
def read_codes(base, start, slot, inside, width: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
               STEP_BYTES: tl.constexpr):  # fmt: skip
    """Of the rows `slot` [K] of `width` bytes: codes of even and of odd columns [K, block / 2], and the step [K].

    Those that are not `inside` are not read; their steps are 0. `base` is a multiple of 4.
    """
    base += start - (start & 3)  # what differs from row to row fits into 32 bits
    first = (start & 3).to(tl.int32) + tl.where(inside, slot, 0) * width
    words = base.to(tl.pointer_type(tl.uint32), bitcast=True)
    even, odd = read_chunks(words, first, 0, 1, block // 4 // LANES, size, block)
    step = read_float16(base + first + (width - STEP_BYTES), inside)
    return as_codes(even), as_codes(odd), step


@triton.jit
def halved_queries(q, row, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Queries at `q`, `row` numbers apart, for `add_codes`.

    Returns:
        Even and odd columns [BD / 2, BG] float16, divided by a power of 2 for each query; 2^24 times this [BG], which
        products are multiplied by; and what is taken off them before [BG].
    """
    g, column = tl.arange(0, BG), columns(BD)
    at = q + column[:, None] + g[None, :] * row
    there = (column < D)[:, None] & (g < GROUP)[None, :]  # D is even
    even = tl.load(at, mask=there, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=there, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(even), 0), tl.max(tl.abs(odd), 0))
    scale = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(scale > 0, scale, 1.0)
    even, odd = (even / scale[None, :]).to(tl.float16), (odd / scale[None, :]).to(tl.float16)
    total = tl.sum(even.to(tl.float32), 0) + tl.sum(odd.to(tl.float32), 0)
    return even, odd, scale * UNIT, total * (MIDDLE / UNIT)


@triton.jit
def row_of_levels(base, start, width: tl.constexpr, size: tl.constexpr, block: tl.constexpr, STEP_BYTES: tl.constexpr):
    """Numbers of even and odd columns [block / 2] of one row, float32."""
    column = columns(block)
    even = tl.load(base + start + column, mask=column < size, other=0).to(tl.float32)
    odd = tl.load(base + start + column + 1, mask=column < size, other=0).to(tl.float32)
    one = tl.arange(0, 1)
    step = tl.sum(read_float16(base + start + (width - STEP_BYTES) + one, one < 1), 0)
    return (even - MIDDLE) * step, (odd - MIDDLE) * step


@triton.jit
def add_codes(
    top, denominator, even, odd, middle, q_even, q_odd, q_factor, q_middle, key, at_key, value, at_value, slot, inside,
    seen, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr,
    STEP_BYTES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`add_pairs` of 8 bits: sums of even and odd columns [BV / 2, BG], and what is taken off them [BG].

    Queries are columns here: tensor cores take them by eights, but rows by sixteens.
    """
    k_even, k_odd, k_step = read_codes(key, at_key, slot, inside, WK, D, BD, STEP_BYTES)
    v_even, v_odd, v_step = read_codes(value, at_value, slot, inside, WV, DV, BV, STEP_BYTES)
    products = tl.dot(k_odd, q_odd, tl.dot(k_even, q_even))
    products = (products - q_middle[None, :]) * q_factor[None, :] * k_step[:, None]
    s = tl.where(seen[:, None], capped(products, scale, SOFTCAP), -float("inf"))
    new = tl.maximum(top, tl.max(s, 0))
    finite = tl.where(new == -float("inf"), 0.0, new)
    faded = tl.exp2(top - finite)
    weights = tl.exp2(s - finite[None, :])
    denominator = denominator * faded + tl.sum(weights, 0)
    largest = tl.max(tl.abs(v_step), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    weights = (weights * (v_step / largest)[:, None]).to(tl.float16)
    even = even * faded[None, :] + tl.dot(tl.trans(v_even), weights) * (largest * UNIT)
    odd = odd * faded[None, :] + tl.dot(tl.trans(v_odd), weights) * (largest * UNIT)
    middle = middle * faded + tl.sum(weights.to(tl.float32), 0) * (largest * MIDDLE)
    return new, denominator, even, odd, middle
