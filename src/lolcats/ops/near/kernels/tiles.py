"""Pieces that the kernels of near attention share: which keys a block of queries may see, and their tiles.

A *block* is C queries that share one list of *slots*: the s sinks, then the pairs that are kept when the block begins
(`Selection.before`), empty ones last. All other keys that its queries see are in a row: from the first that leaves
within the block (or is in a window) to the last query. Which query sees which follows from numbers, so there are no
masks in memory: a slot is seen by the queries `since` <= i < `limit`, a key of the row by `window_visible`.

Tokens are counted from the first new one. Keys of a state lie in one tensor of `held` rows: the ring (w rows, the token
at position p in row p mod w), the kept pairs (P), the sinks (s); where key heads differ in w and P, each has as many
rows as the largest (`ring`, `pairs`), and of its kept pairs some are surplus (`Selection`). A *code* says where a key
is: token t is t, row r of what is held is -1 - r.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.ops.hybrid.kernels.tiles import LOG2E, cap, times_slope

SIZES = ["tokens", "blocks", "window", "pairs", "reach"]
"""Numbers that a kernel is told at run time, whatever divides them: key heads differ in window and pairs, and a kernel
made anew for each of them would take longer to compile than to train."""


@triton.jit
def read_text(lengths, start, batch, tokens, HAS_LENGTHS: tl.constexpr, HAS_STATE: tl.constexpr):
    """New tokens of a text, and the position of the first."""
    count = tokens
    offset = tokens * 0
    if HAS_LENGTHS:
        count = tl.load(lengths + batch).to(tl.int32)
    if HAS_STATE:
        offset = tl.load(start + batch).to(tl.int32)
    return count, offset


@triton.jit
def filled_slots(
    begin, window, pairs, SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, HAS_STATE: tl.constexpr
):  # fmt: skip
    """How many slots of a block may hold something. No more pairs are kept than have left, and these come first.

    `pairs` is how many the key head has.
    """
    filled = window * 0 + SINKS
    if HAS_PAIRS:
        if HAS_STATE:
            filled += pairs
        else:
            filled += tl.minimum(tl.maximum(begin - window - SINKS, 0), pairs)
    return filled


@triton.jit
def row_begin(
    first, begin, window, HAS_PAIRS: tl.constexpr, HAS_STATE: tl.constexpr
):  # fmt: skip
    """The first key of the row that queries from `first` on, in the block that begins at `begin`, see."""
    low = begin - window if HAS_PAIRS else first - window + 1
    if not HAS_STATE:
        low = tl.maximum(low, 0)
    return low


@triton.jit
def held_code(token, offset, window):
    """Code of a key of the row: a new token, or one in the ring."""
    slot = tl.maximum(token + offset, 0) % window
    return tl.where(token < 0, -1 - slot, token)


@triton.jit
def slot_keys(
    before,
    until,
    slot,
    offset,
    count,
    window,
    pairs,
    ring,
    SINKS: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """`code`, `since` and `limit` of slots; a limit of 0 where nothing is. `ring` rows are held before the pairs."""
    is_sink = slot < SINKS
    since = tl.where(is_sink, slot - offset, 0)
    limit = tl.where(is_sink, count, 0)
    code = since
    if HAS_STATE:
        code = tl.where(is_sink & (since < 0), -1 - (ring + pairs + slot), code)
    if HAS_PAIRS:
        kept = (slot >= SINKS) & (slot < SINKS + pairs)
        index = tl.load(before + slot - SINKS, mask=kept, other=0)
        end = tl.load(until + index, mask=kept, other=0)
        token = index - (pairs + window)
        real = (index >= pairs) & (token + offset >= SINKS)
        source = token
        if HAS_STATE:
            real = real | (index < pairs)
            source = tl.where(index < pairs, -1 - (ring + index), held_code(token, offset, window))
        limit = tl.where(kept & real, end, limit)
        code = tl.where(kept, source, code)
    return code, since, limit


@triton.jit
def slots_visible(query, since, limit, count):
    """Which query sees which slot; broadcasts."""
    return (query >= since) & (query < limit) & (query < count)


@triton.jit
def row_limits(until, token, tokens, window, pairs, HAS_PAIRS: tl.constexpr):
    """The query from which on a key of the row is not kept; 0 where it is not known to leave."""
    limit = token * 0
    if HAS_PAIRS:
        inside = (token + window >= 0) & (token + window < tokens)
        limit = tl.load(until + (pairs + window) + token, mask=inside, other=0)
    return limit


@triton.jit
def window_visible(
    query, token, limit, offset, count, window, SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr
):  # fmt: skip
    """Which query sees which key of the row: in its window, or left and kept; broadcasts."""
    distance = query - token
    near = distance < window
    if HAS_PAIRS:
        near = near | (query < limit)
    return near & (distance >= 0) & (token + offset >= SINKS) & (query < count)


@triton.jit
def load_keys(
    new, stride, held, code, count, size: tl.constexpr, block: tl.constexpr, HAS_STATE: tl.constexpr
):  # fmt: skip
    """Keys or values at `code` as a tile of `block` columns; zeros where there are none."""
    column = tl.arange(0, block)
    mask = ((code >= 0) & (code < count))[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    tile = tl.load(new + code.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    if HAS_STATE:
        mask = (code < 0)[:, None]
        if size % block != 0:
            mask = mask & (column < size)[None, :]
        old = tl.load(held + (-1 - code)[:, None] * size + column[None, :], mask=mask, other=0.0)
        tile = tl.where((code < 0)[:, None], old, tile)
    return tile


@triton.jit
def capped(products, scale, SOFTCAP: tl.constexpr):
    """Scores in units of log(2): powers of two are what the hardware has."""
    if SOFTCAP > 0:
        s = cap(products * scale, SOFTCAP) * LOG2E
    else:
        s = products * (scale * LOG2E)
    return s


@triton.jit
def slope(ds, s, scale, SOFTCAP: tl.constexpr):
    """Gradient of the products from that of the scores s, which `capped` has made."""
    return times_slope(ds, s * (1.0 / LOG2E), SOFTCAP) * scale
