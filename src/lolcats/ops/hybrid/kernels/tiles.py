"""Pieces that all kernels share: rows of a packed text, tiles, feature maps, which pairs are near.

A *row* is one text: tokens start .. start + length - 1 of one batch entry. Kernels count tokens from the start of their
row, in tiles of T and blocks of C = T / 2. A tile of queries meets the keys from REACH blocks before it to its own end
pair by pair, older keys through a state; a tile of keys meets the queries from its start to REACH blocks after it pair
by pair, later ones through a state. Linear pairs are where the keys are older: in the key blocks before block MIXED,
counted from the start of a query tile, and in the query blocks from FIRST on, counted from that of a key tile.
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
def hedgehog_halves(y, scale, WIDTH: tl.constexpr, BF: tl.constexpr):
    """scale softmax(y) and scale softmax(-y) over the features, at least 1e-12 scale: [rows, BF] each."""
    y *= LOG2E
    if WIDTH != BF:
        real = (tl.arange(0, BF) < WIDTH)[None, :]
        above = tl.max(tl.where(real, y, -float("inf")), 1)
        below = tl.min(tl.where(real, y, float("inf")), 1)
        front = tl.where(real, tl.exp2(y - above[:, None]), 0.0)
        back = tl.where(real, tl.exp2(below[:, None] - y), 0.0)
    else:
        front = tl.exp2(y - tl.max(y, 1)[:, None])
        back = tl.exp2(tl.min(y, 1)[:, None] - y)
    front = tl.maximum(front * (scale / tl.sum(front, 1))[:, None], 1e-12 * scale)
    back = tl.maximum(back * (scale / tl.sum(back, 1))[:, None], 1e-12 * scale)
    if WIDTH != BF:
        front = tl.where(real, front, 0.0)
        back = tl.where(real, back, 0.0)
    return front, back


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
def load_state(
    local,
    local_sum,
    before,
    before_sum,
    fade,
    part: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BF: tl.constexpr,
    DV: tl.constexpr,
    column0,
    BV: tl.constexpr,
):
    """One part of the state that a group of blocks receives: kv [BF, BV] in the type it is stored in, k_sum [BF] fp32.

    It is the sum over its own segment up to the group and, with SPLIT, that of the segments before, times `fade`.
    """
    kv = load_matrix(local + part * WIDTH * DV, WIDTH, BF, DV, DV, column0, BV)
    f = tl.arange(0, BF)
    k_sum = tl.load(local_sum + part * WIDTH + f, mask=f < WIDTH, other=0.0)
    if SPLIT:
        older = load_matrix(before + part * WIDTH * DV, WIDTH, BF, DV, DV, column0, BV)
        kv = (kv + older * fade).to(kv.dtype)
        k_sum += tl.load(before_sum + part * WIDTH + f, mask=f < WIDTH, other=0.0) * fade
    return kv, k_sum
