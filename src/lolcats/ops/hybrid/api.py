"""`hybrid_attention`: checks its arguments and calls one implementation."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.ops.devices import capability, without_autocast
from lolcats.ops.hybrid.checks import check_call, read_cuts
from lolcats.ops.hybrid.chunked import chunked_attention, compiled_attention
from lolcats.ops.hybrid.layout import Inputs
from lolcats.ops.hybrid.packed import one_by_one, packed_attention
from lolcats.ops.hybrid.recurrent import recurrent_attention
from lolcats.ops.hybrid.reference import reference_attention
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridOutput, HybridSpec, HybridState


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


def _triton(inputs: Inputs, spec: HybridSpec, return_state: bool) -> HybridOutput:
    return _kernels().attention(inputs, spec, return_state)


IMPLEMENTATIONS: dict[str, Callable[[Inputs, HybridSpec, bool], HybridOutput]] = {
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
    return device.type == "cuda" and _kernels() is not None and capability(device) >= (8, 0)


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
    features: tuple[Tensor, Tensor] | MapWeights,
    window_factor: Tensor,
    spec: HybridSpec,
    *,
    log_decay: Tensor | None = None,
    sink_logits: Tensor | None = None,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: HybridState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> HybridOutput:
    """Causal attention: softmax over near keys, linear attention over the others, one shared denominator.

    The formula is in `lolcats.ops.hybrid.reference` (LoLCATs, arXiv 2410.10254, Eq. 6). Sums run in float32, or in
    float64 where the inputs are float64. Query head h uses key/value head `h // (H / KV)`.

    Args:
        q: queries [B, H, N, D]; k: keys [B, KV, N, D]; v: values [B, KV, N, Dv]; H is a multiple of KV.
        features: query features [B, H, N, F] >= 0 and key features [B, H or KV, N, F] >= 0; or the weights of the
            feature maps that make them from q and k (`lolcats.ops.maps`), which get gradients too. From weights the
            kernels make the features themselves, so that they are never in memory, and the ring of the state that
            they return has no `phi_k`; the ring of `initial_state` needs none.
        window_factor: logits [H]; the softmax half is multiplied by g = sigmoid(window_factor).
        spec: window, sinks and scores, see `HybridSpec`.
        log_decay: [B, H, N] <= 0; a pair j -> i of the linear half is multiplied by exp of its sum over j+1 .. i.
        sink_logits: [H] learned sinks without a value (gpt-oss): one logit per query head, which takes part in the row
            maximum m and adds g exp(logit - m) to the denominator.
        attention_mask: [B, N], nonzero at real tokens; padding may be on the left or on the right.
        segment_ids: [B, N] integers; tokens see only their own segment (a run of equal numbers; negative is
            padding). Excludes `attention_mask`, `initial_state` and `return_state`.
        cu_seqlens: [T + 1] int32 or int64, 0 = c_0 <= c_1 <= ... <= c_T = N: the one row (B = 1) holds T texts, text t
            from token c_t up to c_(t+1), which see only themselves. States are then of a batch of T. Its numbers are
            read on the host, where it may lie. Excludes `attention_mask` and `segment_ids`.
        initial_state: the `state` of an earlier call on the tokens before these.
        return_state: also return the state after the last token (of each text).
        impl: "reference" (quadratic), "chunked" (linear in N), "recurrent" (a step a token), "compiled" (chunked
            under torch.compile), "triton" (kernels, on CUDA devices) or "auto": "triton" where it can run the call
            and nothing is being compiled, else "chunked". The kernels sum in float32; of tied largest scores the first
            takes the whole gradient of m.

    Raises:
        ValueError: a shape, a number or a name that does not fit; the message says what was expected.
    """
    maps = features if isinstance(features, MapWeights) else None
    phi_q, phi_k = (q, k) if isinstance(features, MapWeights) else features  # tokens stand where features will be
    inputs = Inputs(
        q, k, v, phi_q, phi_k, window_factor, log_decay, attention_mask, segment_ids, initial_state, sink_logits
    )
    cuts = None if cu_seqlens is None else read_cuts(cu_seqlens, inputs)
    check_call(inputs, spec, maps, return_state, None if cuts is None else len(cuts) - 1)
    if segment_ids is not None:
        inputs = inputs._replace(segment_ids=_number_runs(segment_ids))
    impl = _choose(impl, inputs, maps, return_state)
    fused = maps is not None and impl == "triton" and _kernels().fits(q, maps)
    if maps is not None and not fused:
        inputs = _with_features(inputs, maps)
    if log_decay is not None and not fused:  # one decay per query head needs one state per query head
        phi_k = inputs.phi_k
        inputs = inputs._replace(phi_k=phi_k.repeat_interleave(q.shape[1] // phi_k.shape[1], 1))

    def run(inputs: Inputs, return_state: bool) -> HybridOutput:
        if fused:
            return _kernels().attention(inputs, spec, return_state, maps)
        return IMPLEMENTATIONS[impl](inputs, spec, return_state)

    with without_autocast(q.device.type):  # the sums are fp32 whatever surrounds us
        if cuts is None:
            return run(inputs, return_state)
        if impl == "reference":
            return one_by_one(run, inputs, spec, cuts, return_state)
        return packed_attention(run, inputs, cuts, return_state)


def _with_features(inputs: Inputs, maps: MapWeights) -> Inputs:
    """The features of the tokens, and of the keys in the state's ring where it lacks them."""
    state = inputs.state
    if state is not None and state.window.phi_k is None:
        held = maps.phi_k(state.window.k)
        if inputs.log_decay is not None:
            held = held.repeat_interleave(inputs.q.shape[1] // held.shape[1], 1)
        state = state._replace(window=state.window._replace(phi_k=held))
    return inputs._replace(phi_q=maps.phi_q(inputs.q), phi_k=maps.phi_k(inputs.k), state=state)


def _number_runs(segment_ids: Tensor) -> Tensor:
    """Number the runs of equal ids, so that an id that comes again is another text; -1 at padding."""
    changes = torch.nn.functional.pad((segment_ids[:, 1:] != segment_ids[:, :-1]).long(), (1, 0))
    return torch.where(segment_ids >= 0, changes.cumsum(-1), -1)
