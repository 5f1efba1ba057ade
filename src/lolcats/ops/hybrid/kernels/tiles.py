"""Pieces that all kernels share: rows of a packed text, tiles, feature maps, which pairs are near.

A *row* is one text: tokens start .. start + length - 1 of one batch entry. Kernels count tokens from the start of
their row, in blocks of C, one for each program; a tile is T = 2 C tokens, which share a stored state. The queries of a
tile meet the keys from REACH blocks before the tile on pair by pair, older keys through the state; the keys of a tile
meet the queries up to REACH blocks after the tile pair by pair, later ones through the state. Linear pairs are where
the keys are older: in the key blocks before block MIXED, counted from the block of the queries, and in the query
blocks from FIRST on, counted from that of the keys.

Tiles of tensors come through descriptors (TMA: the copy engine of Hopper GPUs fills shared memory by itself) or, where
these do not take a tensor, through pointers (launch.py decides).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import triton
import triton.language as tl

GIVEN: tl.constexpr = tl.constexpr(0)
HEDGEHOG: tl.constexpr = tl.constexpr(1)
T2R: tl.constexpr = tl.constexpr(2)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
COUNTS = ["segments", "groups", "tiles", "segment_tiles", "splits"]
LENGTHS = ["tokens", *COUNTS]
"""Numbers that a kernel is told at run time, whatever divides them: they come from the length of a text, and a kernel
made anew for each would take seconds where a forward pass takes milliseconds. Those of backward passes are made once
more for lengths that 16 divides, as those of training are: that spares them much of what they spill."""


@triton.jit
def read_row(rows, row, tokens, HAS_ROWS: tl.constexpr):
    """Batch entry (int64), first token (int64), number of tokens and position of the first token of a row."""
    if HAS_ROWS:
        batch = tl.load(rows + row * 4).to(tl.int64)
        start = tl.load(rows + row * 4 + 1).to(tl.int64)
        length = tl.load(rows + row * 4 + 2)
        offset = tl.load(rows + row * 4 + 3)
    else:
        batch = row.to(tl.int64)
        start = batch * 0
        length = tokens
        offset = tokens * 0
    return batch, start, length, offset


@triton.jit
def load_tile(base, stride, first, length, column0, C: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """Tokens first .. first + C - 1, columns column0 .. column0 + block - 1; zero outside the text and `size`."""
    index = tl.arange(0, C)
    column = column0 + tl.arange(0, block)
    mask = ((first + index >= 0) & (first + index < length))[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    return tl.load(
        base + tl.cast(first, tl.int64) * stride + index[:, None] * stride + column[None, :], mask=mask, other=0.0
    )


@triton.jit
def store_tile(base, stride, first, length, column0, tile, C: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """The counterpart of `load_tile`."""
    index = tl.arange(0, C)
    column = column0 + tl.arange(0, block)
    mask = (first + index < length)[:, None]
    if size % block != 0:
        mask = mask & (column < size)[None, :]
    target = base + tl.cast(first, tl.int64) * stride + index[:, None] * stride + column[None, :]
    tl.store(target, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(
    x,
    x_b,
    x_h,
    x_n,
    batch,
    head,
    start,
    first,
    length,
    column0,
    C: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
    TMA: tl.constexpr,
):
    """`load_tile` of one batch entry, head and row of x [B, heads, N, size]."""
    if TMA:
        at = [batch.to(tl.int32), tl.cast(head, tl.int32), (start + first).to(tl.int32), tl.cast(column0, tl.int32)]
        tile = tl.reshape(x.load(at), [C, block])
    else:
        tile = load_tile(x + batch * x_b + head * x_h + start * x_n, x_n, first, length, column0, C, size, block)
    return tile


@triton.jit
def load_part(
    x, index, R: tl.constexpr, BR: tl.constexpr, columns: tl.constexpr, column0, block: tl.constexpr, TMA: tl.constexpr
):
    """`load_matrix` of number `index` of x [M, R, columns]."""
    if TMA:
        matrix = tl.reshape(x.load([tl.cast(index, tl.int32), 0, tl.cast(column0, tl.int32)]), [BR, block])
    else:
        matrix = load_matrix(x + tl.cast(index, tl.int64) * R * columns, R, BR, columns, columns, column0, block)
    return matrix


@triton.jit
def load_vector(base, first, length, C: tl.constexpr):
    """One number a token: [C], zero outside."""
    index = tl.arange(0, C)
    inside = (first + index >= 0) & (first + index < length)
    return tl.load(base + tl.cast(first, tl.int64) + index, mask=inside, other=0.0)


@triton.jit
def store_vector(base, first, length, x, C: tl.constexpr):
    """The counterpart of `load_vector`."""
    index = tl.arange(0, C)
    tl.store(base + tl.cast(first, tl.int64) + index, x, mask=first + index < length)


@triton.jit
def load_matrix(base, R: tl.constexpr, BR: tl.constexpr, stride, columns: tl.constexpr, column0, block: tl.constexpr):
    """Matrix [R, columns] from `column0` on as [BR, block]; zero outside."""
    row = tl.arange(0, BR)
    column = column0 + tl.arange(0, block)
    source = base + row[:, None] * stride + column[None, :]
    if (R == BR) and (columns % block == 0):
        matrix = tl.load(source)
    else:
        matrix = tl.load(source, mask=(row < R)[:, None] & (column < columns)[None, :], other=0.0)
    return matrix


@triton.jit
def store_matrix(
    base, tile, R: tl.constexpr, BR: tl.constexpr, stride, columns: tl.constexpr, column0, block: tl.constexpr
):
    """The counterpart of `load_matrix`."""
    row = tl.arange(0, BR)
    column = column0 + tl.arange(0, block)
    target = base + row[:, None] * stride + column[None, :]
    tl.store(target, tile.to(base.dtype.element_ty), mask=(row < R)[:, None] & (column < columns)[None, :])


@triton.jit
def store_part(
    x, index, tile, R: tl.constexpr, BR: tl.constexpr, columns: tl.constexpr, column0, block: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The counterpart of `load_part`."""
    if TMA:
        low = tl.reshape(tile.to(x.dtype), [1, BR, block])
        x.store([tl.cast(index, tl.int32), 0, tl.cast(column0, tl.int32)], low)
    else:
        store_matrix(x + index * R * columns, tile, R, BR, columns, columns, column0, block)


@triton.jit
def changing_one(pointer, dtype: tl.constexpr):
    """1, read anew in each pass of a loop: `pointer` holds a number in fp32, which is never that one of the NaNs.

    Left operands of products that lie in registers and stay the same over a loop are multiplied by it. Otherwise the
    assembler (ptxas 12.8, of Triton 3.6) moves their packing out of the loop and lets another product of the loop take
    their registers: seen in machine code for the H100, with heads of size 64.
    """
    bits = tl.load(pointer, volatile=True).to(tl.int32, bitcast=True)
    return tl.where(bits == 0x7FA5A5A5, 0.0, 1.0).to(dtype)


# One return a function: Triton reads on after a return in a branch, whatever the branch's condition is.
@triton.jit
def load_bias(base, WIDTH: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr):
    """T2R's bias of one head as [BF] fp32."""
    column = tl.arange(0, BF)
    if MAP == T2R:
        bias = tl.load(base + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros((BF,), tl.float32)
    return bias


@triton.jit
def hedgehog_half(y, scale, WIDTH: tl.constexpr, BF: tl.constexpr):
    """scale softmax(y / log2(e)) over the features, at least 1e-12 scale: [rows, BF]."""
    if WIDTH != BF:
        real = (tl.arange(0, BF) < WIDTH)[None, :]
        y = tl.where(real, y, -float("inf"))
    e = tl.exp2(y - tl.max(y, 1)[:, None])
    e = tl.maximum(e * (scale / tl.sum(e, 1))[:, None], 1e-12 * scale)
    if WIDTH != BF:
        e = tl.where(real, e, 0.0)
    return e


@triton.jit
def hedgehog_halves(y, scale, WIDTH: tl.constexpr, BF: tl.constexpr):
    """scale softmax(y) and scale softmax(-y) over the features, at least 1e-12 scale: [rows, BF] each."""
    y *= LOG2E
    return hedgehog_half(y, scale, WIDTH, BF), hedgehog_half(-y, scale, WIDTH, BF)


@triton.jit
def map_part(
    x, w, bias, scale, sign, WIDTH: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr
):
    """One part of `map_features`: of a hedgehog map the half of softmax(sign xW)."""
    if MAP == HEDGEHOG:
        y = tl.dot(x, w, input_precision=PRECISION) * (LOG2E * sign)
        phi = hedgehog_half(y, scale, WIDTH, BF)
    else:
        phi = map_features(x, w, bias, scale, WIDTH, BF, MAP, PRECISION)[0]
    return phi


@triton.jit
def map_features(x, w, bias, scale, WIDTH: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """scale phi(x) in fp32 as a tuple of parts [rows, BF]: the two halves of a hedgehog map, or the whole.

    x is [rows, BD] and w [BD, BF]; with MAP == GIVEN, x are the features.
    """
    if MAP == GIVEN:
        phi = (x.to(tl.float32) * scale,)
    elif MAP == T2R:
        phi = (tl.maximum(tl.dot(x, w, input_precision=PRECISION) + bias[None, :], 0.0) * scale,)
    else:
        phi = hedgehog_halves(tl.dot(x, w, input_precision=PRECISION), scale, WIDTH, BF)
    return phi


@triton.jit
def map_backward(phi, dphi, MAP: tl.constexpr):
    """Gradient [rows, BF] with respect to xW (the features themselves with GIVEN) from the parts of phi and dphi."""
    if MAP == GIVEN:
        dx = dphi[0]
    elif MAP == T2R:
        dx = tl.where(phi[0] > 0.0, dphi[0], 0.0)
    else:
        front = tl.where(phi[0] > 1e-12, dphi[0], 0.0)  # phi without its scale
        back = tl.where(phi[1] > 1e-12, dphi[1], 0.0)
        front = phi[0] * (front - tl.sum(phi[0] * front, 1)[:, None])
        back = phi[1] * (back - tl.sum(phi[1] * back, 1)[:, None])
        dx = front - back
    return dx


@triton.jit
def cap(s, SOFTCAP: tl.constexpr):
    """SOFTCAP tanh(s / SOFTCAP), or s itself where SOFTCAP is 0."""
    if SOFTCAP > 0:
        e = tl.exp(-2.0 * tl.abs(s) / SOFTCAP)
        bent = SOFTCAP * (1.0 - e) / (1.0 + e)
        s = tl.where(s < 0, -bent, bent)
    return s


@triton.jit
def times_slope(ds, s, SOFTCAP: tl.constexpr):
    """ds times the derivative of `cap`, from the capped score s."""
    if SOFTCAP > 0:
        ds = ds * (1.0 - (s / SOFTCAP) * (s / SOFTCAP))
    return ds


@triton.jit
def real_keys(key, offset, SINKS: tl.constexpr):
    """Keys [K] as `pair_masks` wants them: those before the text, and sinks, lie after every query."""
    return tl.where((key >= 0) & (key + offset >= SINKS), key, 1073741824)


@triton.jit
def pair_masks(query, key, offset, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """Which pairs are softmax pairs and which linear ones, from `real_keys`; `query` and `key` broadcast."""
    distance = query - key
    if WINDOW == 0:
        far = distance >= 0
        near = distance < -2147483647
    elif TERRACED:
        apart = (query + offset) // WINDOW - (key + offset) // WINDOW
        near = (distance >= 0) & (apart <= 1)
        far = apart > 1
    else:
        near = distance.to(tl.uint32, bitcast=True) < WINDOW
        far = distance >= WINDOW
    return near, far


@triton.jit
def load_sums(
    local_sum,
    before_sum,
    fade,
    part,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BF: tl.constexpr,
):
    """One part of k_sum [BF] fp32 that a tile receives.

    Like kv it is the sum over its own segment up to the tile and, with SPLIT, of the segments before, times `fade`.
    """
    f = tl.arange(0, BF)
    k_sum = tl.load(local_sum + part * WIDTH + f, mask=f < WIDTH, other=0.0)
    if SPLIT:
        k_sum += tl.load(before_sum + part * WIDTH + f, mask=f < WIDTH, other=0.0) * fade
    return k_sum


@triton.jit
def add_softmax(top, denominator, acc, s, v_tile, PRECISION: tl.constexpr):
    """Add exp2(s - top) v to numerator and denominator, both rescaled where the maximum grows. s is [C, keys]."""
    new = tl.maximum(top, tl.max(s, 1))
    finite = tl.where(new == -float("inf"), 0.0, new)
    faded = tl.exp2(top - finite)
    weights = tl.exp2(s - finite[:, None])
    denominator = denominator * faded + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * faded[:, None], input_precision=PRECISION)
    return new, denominator, acc
