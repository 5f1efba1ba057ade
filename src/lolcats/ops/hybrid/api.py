"""`hybrid_attention` and `mapped_attention`: check their arguments and call one implementation."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.ops.hybrid.chunked import chunked_attention, compiled_attention
from lolcats.ops.hybrid.layout import Inputs, Settings
from lolcats.ops.hybrid.recurrent import recurrent_attention
from lolcats.ops.hybrid.reference import reference_attention
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridOutput, HybridState, ring_slots


class _Kernels(NamedTuple):
    """The functions of `kernels.attention` that are called here."""

    attention: Callable[..., HybridOutput]
    refusal: Callable[..., str | None]
    fits: Callable[..., bool]


@functools.cache
def _kernels() -> Any:
    """The Triton kernels (`_Kernels`), or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.hybrid.kernels.attention import fits, kernel_attention, refusal

    return _Kernels(kernel_attention, refusal, fits)


def _triton(inputs: Inputs, settings: Settings, return_state: bool) -> HybridOutput:
    return _kernels().attention(inputs, settings, return_state)


IMPLEMENTATIONS: dict[str, Callable[[Inputs, Settings, bool], HybridOutput]] = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "recurrent": recurrent_attention,
    "compiled": compiled_attention,
    "triton": _triton,
}


def resolve_impl(impl: str) -> str:
    """`impl` itself, if it is a name of an implementation or "auto".

    Raises:
        ValueError: `impl` is not "auto" or one of `IMPLEMENTATIONS`, or Triton is asked for and not installed.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of 'auto', {', '.join(map(repr, IMPLEMENTATIONS))}; got {impl!r}")
    if impl == "triton" and _kernels() is None:
        raise ValueError("impl 'triton' needs the package triton, which is not installed here")
    return impl


def kernels_available(device: torch.device) -> bool:
    """Whether "auto" means the Triton kernels on `device`."""
    return device.type == "cuda" and _kernels() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _choose(impl: str, inputs: Inputs, maps: MapWeights | None, return_state: bool) -> str:
    """The implementation of one call: kernels on a GPU where they can, else the chunked form."""
    impl = resolve_impl(impl)
    if impl not in ("auto", "triton"):
        return impl
    # Kernels are for eager code: under torch.compile the chunked form is what its compiler can work on.
    if impl == "auto" and (inputs.q.device.type != "cuda" or torch.compiler.is_compiling() or _kernels() is None):
        return "chunked"
    reason = _kernels().refusal(inputs, maps, return_state)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl 'triton' cannot run this call: {reason}; use impl 'auto'")
    return "chunked"


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
        sink_logits: [H] learned sinks without a value (gpt-oss): one logit per query head, which takes part in the row
            maximum m and adds g exp(logit - m) to the denominator.
        attention_mask: [B, N], nonzero at real tokens; padding may be on the left or on the right.
        segment_ids: [B, N] integers; tokens see only their own segment (a run of equal numbers; negative is
            padding). Excludes `attention_mask`, `initial_state` and `return_state`.
        initial_state: the `state` of an earlier call on the tokens before these.
        return_state: also return the state after the last token.
        impl: "reference" (quadratic), "chunked" (linear in N), "recurrent" (a step a token), "compiled" (chunked
            under torch.compile), "triton" (kernels, on CUDA devices) or "auto": "triton" where it can run the call
            and nothing is being compiled, else "chunked". The kernels sum in float32; of tied largest scores the first
            takes the whole gradient of m.

    Raises:
        ValueError: a shape, a number or a name that does not fit; the message says what was expected.
    """
    settings = Settings(window, window_kind, sinks, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    inputs = Inputs(
        q, k, v, phi_q, phi_k, window_factor, log_decay, attention_mask, segment_ids, initial_state, sink_logits
    )
    return _attend(inputs, settings, None, return_state, impl)


def mapped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: MapWeights,
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
    """`hybrid_attention` of phi_q = maps.phi_q(q) and phi_k = maps.phi_k(k), with gradients for the maps' weights.

    The kernels ("triton") make the features themselves, so that they are never in memory; every other implementation
    gets them made before, which is also what this function is defined as. The state's ring may lack `phi_k`, and does
    in the state that the kernels return.

    Args:
        maps: weights of the feature maps, see `lolcats.ops.maps`.
        q, k, v and all others: as in `hybrid_attention`.

    Raises:
        ValueError: as in `hybrid_attention`.
    """
    settings = Settings(window, window_kind, sinks, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    inputs = Inputs(
        q, k, v, q, k, window_factor, log_decay, attention_mask, segment_ids, initial_state, sink_logits
    )  # tokens stand where their features will be
    return _attend(inputs, settings, maps, return_state, impl)


def _attend(inputs: Inputs, settings: Settings, maps: MapWeights | None, return_state: bool, impl: str) -> HybridOutput:
    """Check a call, choose its implementation and run it, on the features of `maps` where they are given."""
    inputs = _checked(inputs, settings, maps, return_state)
    impl = _choose(impl, inputs, maps, return_state)
    fused = maps is not None and impl == "triton" and _kernels().fits(inputs.q, maps)
    if maps is not None and not fused:
        inputs = _with_features(inputs, maps)
    heads, features = inputs.q.shape[1], inputs.phi_k
    if inputs.log_decay is not None and not fused:  # one decay per query head needs one state per query head
        inputs = inputs._replace(phi_k=features.repeat_interleave(heads // features.shape[1], 1))
    with torch.autocast(inputs.q.device.type, enabled=False):  # the sums are fp32 whatever surrounds us
        if fused:
            return _kernels().attention(inputs, settings, return_state, maps)
        return IMPLEMENTATIONS[impl](inputs, settings, return_state)


def _with_features(inputs: Inputs, maps: MapWeights) -> Inputs:
    """The features of the tokens, and of the keys in the state's ring where it lacks them."""
    state = inputs.state
    if state is not None and state.window.phi_k is None:
        held = maps.phi_k(state.window.k)
        if inputs.log_decay is not None:
            held = held.repeat_interleave(inputs.q.shape[1] // held.shape[1], 1)
        state = state._replace(window=state.window._replace(phi_k=held))
    return inputs._replace(phi_q=maps.phi_q(inputs.q), phi_k=maps.phi_k(inputs.k), state=state)


def _checked(inputs: Inputs, settings: Settings, maps: MapWeights | None, return_state: bool) -> Inputs:
    """Check all arguments; number the segments."""
    q, state = inputs.q, inputs.state
    _check_shapes(*inputs[:6])
    if maps is not None:
        _check_maps(maps, q, inputs.k)
    _check_numbers(settings.window, settings.window_kind, settings.sinks, settings.softcap)
    _check_optional(
        q, inputs.log_decay, inputs.sink_logits, inputs.attention_mask, inputs.segment_ids, state, return_state
    )
    if state is not None:
        slots = ring_slots(settings.window, settings.window_kind)
        _check_state(state, q, slots, settings.sinks, inputs.log_decay is not None, maps is None)
    if inputs.segment_ids is not None:
        inputs = inputs._replace(segment_ids=_number_runs(inputs.segment_ids))
    return inputs


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


def _check_maps(maps: MapWeights, q: Tensor, k: Tensor) -> None:
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[3]
    _expect(maps.q.ndim == 3 and maps.k.ndim == 3, "maps with weights [heads, D, f]", (maps.q.shape, maps.k.shape))
    width = maps.q.shape[2]
    _expect(tuple(maps.q.shape) == (heads, size, width), f"maps.q ({heads}, {size}, f)", tuple(maps.q.shape))
    allowed = [(h, size, width) for h in (heads, kv_heads)]
    _expect(tuple(maps.k.shape) in allowed, f"maps.k {allowed[0]} or {allowed[1]}", tuple(maps.k.shape))


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


def _check_state(state: HybridState, q: Tensor, slots: int, sinks: int, decays: bool, features: bool) -> None:
    batch = q.shape[0]
    _expect(state.length.shape == (batch,), f"a state for a batch of {batch}", tuple(state.length.shape))
    _expect(state.window.k.shape[2] == slots, f"a state with {slots} window slots", state.window.k.shape[2])
    held = 0 if state.sinks is None else state.sinks.k.shape[2]
    _expect(held == sinks, f"a state with {sinks} sinks", held)
    _expect(not features or state.window.phi_k is not None, "a state whose window holds phi_k", "none")
    _expect((state.window.log_decay is not None) == decays, f"a state {'with' if decays else 'without'} decay", "other")
