"""`hybrid_attention`: checks its arguments and calls one implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lolcats.ops.hybrid.chunked import chunked_attention, compiled_attention
from lolcats.ops.hybrid.layout import Inputs, Settings
from lolcats.ops.hybrid.recurrent import recurrent_attention
from lolcats.ops.hybrid.reference import reference_attention
from lolcats.ops.types import HybridOutput, HybridState, ring_slots

IMPLEMENTATIONS: dict[str, Callable[[Inputs, Settings, bool], HybridOutput]] = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "recurrent": recurrent_attention,
    "compiled": compiled_attention,
}


def resolve_impl(impl: str) -> str:
    """Name of the implementation that `impl` stands for ("auto" is "chunked").

    Raises:
        ValueError: `impl` is not "auto" or one of `IMPLEMENTATIONS`.
    """
    if impl == "auto":
        return "chunked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of 'auto', {', '.join(map(repr, IMPLEMENTATIONS))}; got {impl!r}")
    return impl


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    window_factor: Tensor,
    *,
    window: int = 64,
    window_kind: str = "sliding",
    sinks: int = 0,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    initial_state: HybridState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> HybridOutput:
    """Causal attention: softmax over near keys, linear attention over the others, one shared denominator.

    The formula is in `lolcats.ops.hybrid.reference` (LoLCATs, arXiv 2410.10254, Eq. 6). Sums run in float32, or in
    float64 where the inputs are float64. Query head h uses key/value head `h // (H / KV)`.

    Args:
        q: queries [B, H, N, D]; k: keys [B, KV, N, D]; v: values [B, KV, N, Dv]; H is a multiple of KV.
        phi_q: query features [B, H, N, F] >= 0; phi_k: key features [B, H or KV, N, F] >= 0.
        window_factor: logits [H]; the softmax half is multiplied by g = sigmoid(window_factor).
        window: 0 is pure linear attention; `window >= N` is exact softmax attention.
        window_kind: "sliding" (the last `window` keys, the query's own included) or "terraced" (the query's own
            block of `window` keys and the block before it; blocks start at the first token of the text).
        sinks: the first tokens of the text that always belong to the softmax half.
        log_decay: [B, H, N] <= 0; a pair j -> i of the linear half is multiplied by exp of its sum over j+1 .. i.
        scale: of the scores; None is 1 / sqrt(D).
        softcap: scores of the softmax half become softcap tanh(score / softcap) (Gemma 2).
        sink_logits: [H] learned sinks without a value (gpt-oss): a logit a query head, which takes part in the row
            maximum m and adds g exp(logit - m) to the denominator.
        attention_mask: [B, N], nonzero at real tokens; padding may be on the left or on the right.
        segment_ids: [B, N] integers; tokens see only their own segment (a run of equal numbers; negative is
            padding). Excludes `attention_mask`, `initial_state` and `return_state`.
        initial_state: the `state` of an earlier call on the tokens before these.
        return_state: also return the state after the last token.
        impl: "reference" (quadratic), "chunked" (linear in N), "recurrent" (a step a token), "compiled" (chunked
            under torch.compile) or "auto".

    Raises:
        ValueError: a shape, a number or a name that does not fit; the message says what was expected.
    """
    run = IMPLEMENTATIONS[resolve_impl(impl)]
    _check_shapes(q, k, v, phi_q, phi_k, window_factor)
    _check_numbers(window, window_kind, sinks, softcap)
    _check_optional(q, log_decay, sink_logits, attention_mask, segment_ids, initial_state, return_state)
    if initial_state is not None:
        _check_state(initial_state, q, ring_slots(window, window_kind), sinks, log_decay is not None)
    if log_decay is not None and phi_k.shape[1] != q.shape[1]:  # one decay a query head needs one state a query head
        phi_k = phi_k.repeat_interleave(q.shape[1] // phi_k.shape[1], 1)
    if segment_ids is not None:
        segment_ids = _number_runs(segment_ids)
    settings = Settings(window, window_kind, sinks, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    inputs = Inputs(
        q, k, v, phi_q, phi_k, window_factor, log_decay, attention_mask, segment_ids, initial_state, sink_logits
    )
    with torch.autocast(q.device.type, enabled=False):  # the sums are fp32 whatever surrounds us
        return run(inputs, settings, return_state)


def _number_runs(segment_ids: Tensor) -> Tensor:
    """Number the runs of equal ids, so that an id that comes again is another text; -1 at padding."""
    changes = torch.nn.functional.pad((segment_ids[:, 1:] != segment_ids[:, :-1]).long(), (1, 0))
    return torch.where(segment_ids >= 0, changes.cumsum(-1), -1)


def _expect(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise ValueError(f"expected {what}; got {got}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, window_factor: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("phi_q", phi_q), ("phi_k", phi_k)):
        _expect(x.ndim == 4, f"{name} with 4 dimensions [batch, heads, tokens, size]", tuple(x.shape))
    batch, heads, n, size = q.shape
    kv_heads = k.shape[1]
    _expect(n >= 1, "at least one token", n)
    _expect(heads % kv_heads == 0, f"query heads ({heads}) to be a multiple of key heads", kv_heads)
    _expect(k.shape == (batch, kv_heads, n, size), f"k {(batch, kv_heads, n, size)}", tuple(k.shape))
    _expect(v.shape[:3] == (batch, kv_heads, n), f"v {(batch, kv_heads, n)} and a value size", tuple(v.shape))
    _expect(phi_q.shape[:3] == (batch, heads, n), f"phi_q {(batch, heads, n)} and a feature size", tuple(phi_q.shape))
    features = phi_q.shape[-1]
    allowed = [(batch, h, n, features) for h in (heads, kv_heads)]
    _expect(tuple(phi_k.shape) in allowed, f"phi_k {allowed[0]} or {allowed[1]}", tuple(phi_k.shape))
    _expect(window_factor.shape == (heads,), f"window_factor ({heads},)", tuple(window_factor.shape))


def _check_numbers(window: int, window_kind: str, sinks: int, softcap: float | None) -> None:
    _expect(window_kind in ("sliding", "terraced"), "window_kind 'sliding' or 'terraced'", repr(window_kind))
    smallest = 1 if window_kind == "terraced" else 0
    _expect(isinstance(window, int) and window >= smallest, f"an integer window >= {smallest}", window)
    _expect(isinstance(sinks, int) and sinks >= 0, "an integer number of sinks >= 0", sinks)
    _expect(softcap is None or softcap > 0, "a softcap > 0, or None", softcap)


def _check_optional(
    q: Tensor,
    log_decay: Tensor | None,
    sink_logits: Tensor | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    initial_state: HybridState | None,
    return_state: bool,
) -> None:
    batch, heads, n, _ = q.shape
    if log_decay is not None:
        _expect(log_decay.shape == (batch, heads, n), f"log_decay {(batch, heads, n)}", tuple(log_decay.shape))
    if sink_logits is not None:
        _expect(sink_logits.shape == (heads,), f"sink_logits ({heads},)", tuple(sink_logits.shape))
    for name, x in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if x is not None:
            _expect(x.shape == (batch, n), f"{name} {(batch, n)}", tuple(x.shape))
    if segment_ids is not None:
        alone = attention_mask is None and initial_state is None and not return_state
        _expect(alone, "segment_ids without attention_mask, initial_state or return_state", "a combination")


def _check_state(state: HybridState, q: Tensor, slots: int, sinks: int, decays: bool) -> None:
    batch = q.shape[0]
    _expect(state.length.shape == (batch,), f"a state for a batch of {batch}", tuple(state.length.shape))
    _expect(state.window.k.shape[2] == slots, f"a state with {slots} window slots", state.window.k.shape[2])
    held = 0 if state.sinks is None else state.sinks.k.shape[2]
    _expect(held == sinks, f"a state with {sinks} sinks", held)
    _expect(state.window.phi_k is not None, "a state whose window holds phi_k", "none")
    _expect((state.window.log_decay is not None) == decays, f"a state {'with' if decays else 'without'} decay", "other")
