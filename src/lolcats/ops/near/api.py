"""`near_attention`: checks its arguments and calls one implementation."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.devices import without_autocast
from lolcats.ops.hybrid.checks import expect
from lolcats.ops.near.blocks import Kernels, block_near, empty_near_state
from lolcats.ops.near.quantize import PairCodec
from lolcats.ops.near.reference import reference_near
from lolcats.ops.near.several import Parts, near_of_several
from lolcats.ops.near.types import Coded, NearOutput, NearSpec, NearState

IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")


def near_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: NearSpec,
    *,
    score: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    sink_q: Tensor | None = None,
    initial_state: NearState | None = None,
    return_state: bool = False,
    codec: PairCodec | None = None,
    coded: Coded | None = None,
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
        sink_q: [B, H, N, D], the queries as sinks see them; None: as all keys do.
        initial_state: the `state` of an earlier call on the tokens before these.
        return_state: also return the state after the last real token of each row.
        codec: stores the pairs of the state in fewer bits; attention sees all pairs as they are when read again.
        coded: what `codec.coded(k, v, return_state)` gives, where it is known already.
        impl: "reference" (literal, whole texts only), "chunked" (blocks in torch; linear in N), "triton" (kernels, on
            CUDA devices) or "auto": "triton" where it can run the call and nothing is being compiled, else "chunked".
            The kernels give no gradient to a call that goes on from a state, or with `sink_q`.

    Returns:
        The output [B, H, N, Dv] in the dtype of v, 0 at padding, and the state.

    Raises:
        ValueError: a shape, a number or a name that does not fit.
    """
    _check(q, k, v, spec, score, lengths, sink_logits)
    if sink_q is not None:
        expect(sink_q.shape == q.shape, f"sink_q {tuple(q.shape)}", tuple(sink_q.shape))
    sink_q = sink_q if spec.sinks else None
    initial_state = None if initial_state is None else initial_state.in_order()
    expect(impl in IMPLEMENTATIONS, f"impl {', '.join(map(repr, IMPLEMENTATIONS))}", repr(impl))
    with without_autocast(q.device.type):
        stored = None
        if codec is not None:
            k, v, keys, values = codec.coded(k, v, return_state) if coded is None else coded
            if keys is not None and values is not None:
                stored = keys, values, initial_state or codec.encode_empty(empty_near_state(k, v, spec))
            initial_state = None if initial_state is None else codec.decode_state(initial_state, k.dtype)
        if impl == "reference":
            expect(initial_state is None and not return_state, "the reference without states", "a state")
            return reference_near(q, k, v, spec, score, lengths, sink_logits, sink_q)
        learns = initial_state is not None and any(t.requires_grad for t in initial_state.tensors())
        kernels = _choose(impl, q, k, v, learns or sink_q is not None, sink_logits)
        return block_near(
            q, k, v, spec, score, lengths, sink_logits, initial_state, return_state, kernels, stored, sink_q
        )


def near_attentions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Parts,
    *,
    score: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    sink_q: Tensor | None = None,
    initial_states: Sequence[NearState] | None = None,
    return_state: bool = False,
    codec: PairCodec | None = None,
    coded: Coded | None = None,
    impl: str = "auto",
) -> tuple[Tensor, list[NearState] | None] | None:
    """`near_attention` of key heads whose sizes differ, all at once; None where it is to run for one part at a time.

    That is where no kernels run, or a gradient is asked for.

    Args:
        q: [B, H, N, D]; k: [B, KV, N, D]; v: [B, KV, N, Dv].
        parts: all KV key heads by their sizes; their specs differ in nothing else.
        initial_states: of each part.
        score, lengths, sink_logits, sink_q, return_state, codec, coded, impl: as in `near_attention`.

    Returns:
        The output [B, H, N, Dv] in the dtype of v and, with `return_state`, the state of each part.

    Raises:
        ValueError: as `near_attention`; or a key head is in no part or in several.
    """
    expect(impl in IMPLEMENTATIONS, f"impl {', '.join(map(repr, IMPLEMENTATIONS))}", repr(impl))
    if len(parts) == 1 or impl not in ("auto", "triton") or (impl == "auto" and not q.is_cuda):
        return None
    largest = max(parts, key=lambda part: part[0].pairs)[0]
    _check(q, k, v, largest, score, lengths, sink_logits)
    heads = sorted(head for _, heads in parts for head in heads)
    expect(heads == [*range(k.shape[1])], f"each of {k.shape[1]} key heads in one part", heads)
    launch = _launch()
    if launch is None or launch.refusal(q, k, v, True, sink_logits) is not None:
        return None
    score = k.new_zeros(k.shape[:3], dtype=torch.float32) if score is None else score
    with without_autocast(q.device.type):
        if coded is None:
            coded = Coded(k, v, None, None) if codec is None else codec.coded(k, v, return_state)
        return near_of_several(
            q, parts, coded, launch.near, score=score, states=initial_states, lengths=lengths, sink_logits=sink_logits,
            sink_q=sink_q, return_state=return_state, codec=codec,
        )  # fmt: skip


class _Launch(NamedTuple):
    """The functions of `kernels.launch` that are called here."""

    near: Kernels
    refusal: Callable[..., str | None]


@functools.cache
def _launch() -> _Launch | None:
    """The kernels, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.near.kernels.launch import kernel_near, refusal

    return _Launch(kernel_near, refusal)


def _choose(
    impl: str, q: Tensor, k: Tensor, v: Tensor, no_gradient: bool, sink_logits: Tensor | None
) -> Kernels | None:  # fmt: skip
    """The kernels where they are asked for, or where they can run on a GPU; None for the form in torch."""
    if impl == "chunked" or (impl == "auto" and (not q.is_cuda or torch.compiler.is_compiling())):
        return None
    launch, reason = _launch(), "it needs the package triton, which is not installed here"
    if launch is not None:
        reason = launch.refusal(q, k, v, no_gradient, sink_logits)
        if reason is None:
            return launch.near
    if impl == "triton":
        raise ValueError(f"impl 'triton' cannot run this call: {reason}; use impl 'auto'")
    return None


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
