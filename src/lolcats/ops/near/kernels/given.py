"""How much attention later queries give each key: two kernels, both by recomputing the products.

`log_sums` has a program for some queries of a head and keeps the logarithm of the softmax's denominator, as flash
attention does. `given_weights` has one for some keys of a key head: it goes through the query heads of its group and
through the queries that are far enough, and keeps the largest and the summed weight of each key. No two programs write
to one place, so results are the same bits each time.

Shapes: q [B, H, N, D]; k [B, KV, N, D]; lse [B, H, N] fp32, to the base of two; windows [KV] int32; out [B, KV, N, 2].
Bytes: k once per tile of queries and query head, q once per tile of keys, both mostly from L2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.devices import device_of
from lolcats.ops.hybrid.kernels.launch import SMALLEST, either, on, padded, pieces, precision, strides
from lolcats.ops.hybrid.kernels.tiles import LOG2E, load_tile, load_vector, store_vector
from lolcats.ops.near.kernels.launch import BY_KEYS, BY_QUERIES, WIDE
from lolcats.ops.near.kernels.tiles import SIZES, capped


@triton.jit(do_not_specialize=SIZES)
def log_sums(
    q, k, sink_logits, lse, q_b, q_h, q_n, k_b, k_h, k_n, tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SOFTCAP: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (HEADS, ROWS of queries, batch)."""
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # those that take longest begin first
    batch = tl.program_id(2).to(tl.int64)
    query = first + tl.arange(0, ROWS)
    k += batch * k_b + (head // GROUP) * k_h
    q_tile = load_tile(q + batch * q_b + head * q_h, q_n, first, tokens, 0, ROWS, D, BD)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    if LEARNED:
        top = tl.zeros((ROWS,), tl.float32) + tl.load(sink_logits + head).to(tl.float32) * LOG2E
        denominator += 1.0
    for key0 in tl.range(0, tl.minimum(first + ROWS, tokens), KEYS, num_stages=STAGES):
        token = key0 + tl.arange(0, KEYS)
        k_tile = load_tile(k, k_n, key0, tokens, 0, KEYS, D, BD)
        s = capped(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, SOFTCAP)
        s = tl.where((token[None, :] <= query[:, None]) & (token < tokens)[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))  # finite from the first tile on: every query sees the first key
        denominator = denominator * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        top = new
    store_vector(lse + (batch * HEADS + head) * tokens, first, tokens, top + tl.log2(denominator), ROWS)


@triton.jit(do_not_specialize=SIZES)
def given_weights(
    q, k, lse, windows, out, q_b, q_h, q_n, k_b, k_h, k_n, tokens, scale, least,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (KEYS of keys, key heads, batch)."""
    key0 = tl.program_id(0) * KEYS
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    window = tl.load(windows + kv_head)
    token = key0 + tl.arange(0, KEYS)
    k_tile = load_tile(k + batch * k_b + kv_head * k_h, k_n, key0, tokens, 0, KEYS, D, BD)
    largest = tl.zeros((KEYS,), tl.float32)
    summed = tl.zeros((KEYS,), tl.float32)
    begin = key0 + window  # no earlier query is far from any of the keys
    parts = tl.maximum(tokens - begin + ROWS - 1, 0) // ROWS
    each = tl.maximum(parts, 1)  # a divisor, also where nothing is far
    for step in tl.range(0, GROUP * parts, num_stages=STAGES):
        head = kv_head * GROUP + step // each
        first = begin + step % each * ROWS
        query = first + tl.arange(0, ROWS)
        q_tile = load_tile(q + batch * q_b + head * q_h, q_n, first, tokens, 0, ROWS, D, BD)
        base = load_vector(lse + (batch * HEADS + head) * tokens, first, tokens, ROWS)
        s = capped(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), scale, SOFTCAP)
        far = (query[None, :] - token[:, None] >= window) & (query < tokens)[None, :]
        w = tl.exp2(tl.where(far, s - base[None, :], -float("inf")))
        largest = tl.maximum(largest, tl.max(w, 1))
        summed += tl.sum(w, 1)
    out += (batch * (HEADS // GROUP) + kv_head) * tokens * 2
    tl.store(out + token * 2, tl.log(largest + least), mask=token < tokens)
    tl.store(out + token * 2 + 1, tl.log(summed * (1.0 / GROUP) + least), mask=token < tokens)


def far_weights(
    q: Tensor,
    k: Tensor,
    windows: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    least: float,
) -> Tensor:
    """Logs of the largest and the summed weight that far queries give each key: [B, KV, N, 2] float32.

    Args:
        q: [B, H, N, D]; k: [B, KV, N, D] of the same dtype: whole texts, of what `launch.refusal` lets through.
        windows: [KV] int32 on their device, at least 1: queries so many tokens later, or more, are far. Windows far
            beyond the text may overflow.
        scale: of the products; softcap: their cap; sink_logits: [H] learned sinks, in the denominators only.
        least: added to a weight before its logarithm is taken.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (batch, heads, n, size), kv_heads = q.shape, k.shape[1]
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, kv_heads, n, 2, dtype=torch.float32, device=q.device)
    sizes: dict[str, Any] = {
        "HEADS": heads, "GROUP": heads // kv_heads, "D": size, "BD": max(SMALLEST, padded(size)),
        "SOFTCAP": float(softcap or 0.0), "PRECISION": precision(q.dtype),
    }  # fmt: skip
    by_queries, by_keys = (WIDE if q.dtype == torch.float32 else cut for cut in (BY_QUERIES, BY_KEYS))
    with device_of(q):
        on(log_sums, (heads, pieces(n, by_queries["ROWS"]), batch))(
            q, k, either(sink_logits, q), lse, *strides(q), *strides(k), n, float(scale),
            **sizes, LEARNED=sink_logits is not None, **by_queries,
        )  # fmt: skip
        on(given_weights, (pieces(n, by_keys["KEYS"]), kv_heads, batch))(
            q, k, lse, windows, out, *strides(q), *strides(k), n, float(scale), float(least), **sizes, **by_keys
        )
    return out
