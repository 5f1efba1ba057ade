"""The definition of near attention: literal, one query after the other. Every faster form answers to it.

For query i of a text, with window w, s sinks and P kept pairs, let

    L(i) = {j : s <= j <= i - w}                  the keys that have left the window,
    K(i) = the P of L(i) of the highest score     (all of them, where they are no more than P) with i - j < reach,
    V(i) = {j : j < s, j <= i} + {j : i - w < j <= i} + K(i).

    out_i = sum over V(i) of exp(q_i k_j scale) v_j / sum over V(i) of exp(q_i k_j scale)

K(i) differs between key heads. With a cap, products are capped; a learned sink adds its exponential to the denominator.
Sinks may be seen by a query of their own: q_i k_j is then sink_q_i k_j for j < s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.hybrid.scores import cap_scores
from lolcats.ops.near.types import NearOutput, NearSpec
from lolcats.ops.types import accumulation_dtype


def reference_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: NearSpec,
    score: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    sink_q: Tensor | None = None,
) -> NearOutput:
    """Near attention over whole texts; arguments as checked by `near_attention`."""
    dtype = accumulation_dtype(q, v)
    batch, heads, n, size = q.shape
    groups = heads // k.shape[1]
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=dtype, device=q.device)
    for row in range(batch):
        end = n if lengths is None else int(lengths[row])
        for head in range(heads):
            kv = head // groups
            marks = None if score is None else score[row, kv].tolist()
            for i in range(end):
                seen = visible(i, spec, marks)
                queries = q[row, head, i].expand(len(seen), -1)
                if sink_q is not None:
                    is_sink = torch.tensor(seen, device=q.device)[:, None] < spec.sinks
                    queries = torch.where(is_sink, sink_q[row, head, i], queries)
                products = (queries.to(dtype) * k[row, kv, seen].to(dtype)).sum(-1) * spec.product_scale(size)
                products = cap_scores(products, spec.softcap)
                if sink_logits is not None:
                    products = torch.cat([products, sink_logits[head, None].to(dtype)])
                out[row, head, i] = products.softmax(-1)[: len(seen)] @ v[row, kv, seen].to(dtype)
    return NearOutput(out.to(v.dtype), None)


def visible(query: int, spec: NearSpec, marks: list[float] | None) -> list[int]:
    """V(i): the keys that a query sees, with the scores `marks` of all keys of its key head."""
    left = range(spec.sinks, query - spec.window + 1)
    best = [] if marks is None else sorted(left, key=lambda j: (-marks[j], j))[: spec.pairs]
    best = [j for j in best if spec.reach is None or query - j < spec.reach]
    window = range(max(spec.sinks, query - spec.window + 1), query + 1)
    return [*range(min(spec.sinks, query + 1)), *sorted(best), *window]
