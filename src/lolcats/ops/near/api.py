"""`near_attention`: checks its arguments and calls one implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.hybrid.checks import expect
from lolcats.ops.near.blocks import block_near, empty_near_state
from lolcats.ops.near.reference import reference_near
from lolcats.ops.near.types import NearOutput, NearSpec, NearState


def near_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: NearSpec,
    *,
    score: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    initial_state: NearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> NearOutput:
    """Causal softmax attention over sinks, a window, and the pairs of the highest score of all that left the window.

    The formula is in `lolcats.ops.near.reference`. A row is a text, padded on the right if at all. Query head h uses
    key head `h // (H / KV)`. Gradients go to q, k and v; none to the scores, which only choose.

    Args:
        q: queries [B, H, N, D]; k: keys [B, KV, N, D]; v: values [B, KV, N, Dv]; H is a multiple of KV.
        spec: window, sinks, kept pairs and how products are made.
        score: [B, KV, N], finite, of each new key; needed exactly if `spec.pairs` > 0.
        lengths: [B] int64, 0 .. N, real tokens of each row; None is N for all.
        sink_logits: [H] learned sinks without a value (gpt-oss), or None.
        initial_state: the `state` of an earlier call on the tokens before these.
        return_state: also return the state after the last real token of each row.
        impl: "reference" (literal, whole texts only), or "chunked" and "auto" (blocks; linear in N).

    Returns:
        The output [B, H, N, Dv] in the dtype of v, 0 at padding, and the state.

    Raises:
        ValueError: a shape, a number or a name that does not fit.
    """
    _check(q, k, v, spec, score, lengths, sink_logits)
    expect(impl in ("auto", "chunked", "reference"), "impl 'auto', 'chunked' or 'reference'", repr(impl))
    with torch.autocast(q.device.type, enabled=False):
        if impl == "reference":
            expect(initial_state is None and not return_state, "the reference without states", "a state")
            return reference_near(q, k, v, spec, score, lengths, sink_logits)
        state = initial_state or empty_near_state(k, v, spec)
        return block_near(q, k, v, spec, score, lengths, sink_logits, state, return_state)


def _check(
    q: Tensor, k: Tensor, v: Tensor, spec: NearSpec, score: Tensor | None, lengths: Tensor | None, logits: Tensor | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(x.ndim == 4, f"{name} with 4 dimensions [batch, heads, tokens, size]", tuple(x.shape))
    batch, heads, n, size = q.shape
    kv_heads = k.shape[1]
    expect(heads % kv_heads == 0, f"query heads ({heads}) to be a multiple of key heads", kv_heads)
    expect(k.shape == (batch, kv_heads, n, size), f"k {(batch, kv_heads, n, size)}", tuple(k.shape))
    expect(v.shape[:3] == (batch, kv_heads, n), f"v {(batch, kv_heads, n)} and a value size", tuple(v.shape))
    expect(spec.window >= 1, "a window of at least 1, the query's own key", spec.window)
    expect(spec.sinks >= 0 and spec.pairs >= 0, "sinks and pairs of at least 0", (spec.sinks, spec.pairs))
    if spec.pairs:
        expect(score is not None, "scores with kept pairs", None)
    if score is not None:
        expect(score.shape == (batch, kv_heads, n), f"score {(batch, kv_heads, n)}", tuple(score.shape))
    if lengths is not None:
        expect(lengths.shape == (batch,), f"lengths ({batch},)", tuple(lengths.shape))
    if logits is not None:
        expect(logits.shape == (heads,), f"sink_logits ({heads},)", tuple(logits.shape))
