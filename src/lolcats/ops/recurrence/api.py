"""`recurrence` and `recurrence_step`: check their arguments and call one implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.devices import without_autocast
from lolcats.ops.hybrid.checks import expect
from lolcats.ops.recurrence.checks import check_recurrence
from lolcats.ops.recurrence.chunked import chunked_recurrence
from lolcats.ops.recurrence.fla import fla_installed, fla_recurrence, fla_refusal
from lolcats.ops.recurrence.layout import (
    Implementation,
    Inputs,
    Spec,
    Sums,
    dtype_of_sums,
    real_tokens,
    without_padding,
)
from lolcats.ops.recurrence.reference import reference_recurrence
from lolcats.ops.recurrence.types import RecurrenceOutput, RecurrentState

RECURRENCE_IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference_recurrence,
    "chunked": chunked_recurrence,
    "fla": fla_recurrence,
}


def resolve_recurrence(impl: str) -> str:
    """`impl` itself, if it is a name of an implementation or "auto".

    Raises:
        ValueError: `impl` is not "auto" or one of `RECURRENCE_IMPLEMENTATIONS`, or flash-linear-attention is asked for
            and not installed.
    """
    if impl != "auto" and impl not in RECURRENCE_IMPLEMENTATIONS:
        names = ", ".join(map(repr, RECURRENCE_IMPLEMENTATIONS))
        raise ValueError(f"expected impl to be one of 'auto', {names}; got {impl!r}")
    if impl == "fla" and not fla_installed():
        raise ValueError(
            "impl 'fla' needs flash-linear-attention, which is not installed here: pip install 'lolcats[fla]'"
        )
    return impl


def _choose(impl: str, inputs: Inputs) -> str:
    """The implementation of one call: flash-linear-attention where it can, else the chunked form."""
    impl = resolve_recurrence(impl)
    if impl not in ("auto", "fla"):
        return impl
    # Under torch.compile the chunked form is what its compiler can work on.
    if impl == "auto" and (torch.compiler.is_compiling() or inputs.q.device.type != "cuda" or not fla_installed()):
        return "chunked"
    reason = fla_refusal(inputs)
    if reason is not None and impl == "fla":
        raise ValueError(f"impl 'fla' cannot run this call: {reason}; use impl 'auto'")
    return "fla" if reason is None else "chunked"


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalised: bool = False,
    scale: float = 1.0,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    initial_state: RecurrentState | None = None,
    return_state: bool = False,
    state_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> RecurrenceOutput:
    """A linear recurrence: without beta linear attention, with beta the delta rule, both with or without decay.

    The formula is in `lolcats.ops.recurrence.reference`; a token sees itself. Sums run in float32, or in float64 where
    an input is float64. Query head h uses key head `h // (H / S)` and value head `h // (H / KV)`.

    Args:
        q: [B, H, N, F]; k: [B, S, N, F], S is H or KV; v: [B, KV, N, Dv]; H is a multiple of KV.
        log_decay: <= 0, [B, S, N] (a number per head) or [B, S, N, F] (a number per channel of k); -inf forgets all.
        beta: [B, S, N] in [0, 1]. The delta rule is stable where beta |k|^2 <= 2: keys of norm 1, say.
        normalised: divide by q_i z_i, the same sum with values of 1; only without beta.
        scale: of the output.
        attention_mask: [B, N], nonzero at real tokens; padding may be anywhere.
        segment_ids: [B, N] integers; each run of equal numbers is a text of its own, negative ones are padding.
            Excludes `attention_mask`, `initial_state` and `return_state`.
        initial_state: the `state` of an earlier call on the tokens before these.
        return_state: also return the state after the last token.
        state_dtype: of the state that is returned, which is rounded to it; None is that of `initial_state`, without one
            that of the sums. Sums are not rounded within a call.
        impl: "reference" (a step a token), "chunked" (torch), "fla" (flash-linear-attention's kernels, which round
            operands to bfloat16) or "auto": "fla" on a CUDA device where it is installed and can run the call, else
            "chunked".

    Raises:
        ValueError: a shape, a combination or a name that does not fit; the message says what was expected.
    """
    inputs = Inputs(q, k, v, log_decay, beta, attention_mask, segment_ids, initial_state)
    check_recurrence(inputs, normalised, state_dtype, return_state)
    run = RECURRENCE_IMPLEMENTATIONS[_choose(impl, inputs)]
    with without_autocast(q.device.type):  # the sums are fp32 whatever surrounds us
        out, sums = run(without_padding(inputs), Spec(normalised, scale), return_state)
    state = None if sums is None else _state(sums, inputs, state_dtype)
    return RecurrenceOutput(out.to(v.dtype), state)


def recurrence_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RecurrentState,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalised: bool = False,
    scale: float = 1.0,
    active: Tensor | None = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, RecurrentState]:
    """`recurrence` at one more token of each text; the old state is left as it is.

    Args:
        q, k, v, log_decay, beta: as in `recurrence`, with N = 1.
        state: of the tokens before this one.
        normalised, scale, state_dtype: as in `recurrence`.
        active: [B], 0 for rows whose token is padding: their output is 0, their state stays.

    Returns:
        The output [B, H, 1, Dv] in the dtype of v, and the new state.

    Raises:
        ValueError: a shape or a combination that does not fit.
    """
    expect(q.ndim == 4 and q.shape[2] == 1, "q [batch, heads, 1, size]", tuple(q.shape))
    mask = None
    if active is not None:
        expect(active.shape == q.shape[:1], f"active {tuple(q.shape[:1])}", tuple(active.shape))
        mask = active[:, None]
    out, new = recurrence(
        q, k, v, log_decay=log_decay, beta=beta, normalised=normalised, scale=scale, attention_mask=mask,
        initial_state=state, return_state=True, state_dtype=state_dtype, impl="reference",
    )  # fmt: skip
    assert new is not None
    return out, new


def _state(sums: Sums, inputs: Inputs, dtype: torch.dtype | None) -> RecurrentState:
    """The state that is returned."""
    before, real = inputs.state, real_tokens(inputs)
    if dtype is None:
        dtype = dtype_of_sums(inputs) if before is None else before.kv.dtype
    if real is None:
        real = torch.ones(inputs.q.shape[0], inputs.q.shape[2], dtype=torch.bool, device=inputs.q.device)
    length = real.sum(-1) if before is None else real.sum(-1) + before.length
    return RecurrentState(sums.kv.to(dtype), None if sums.k_sum is None else sums.k_sum.to(dtype), length)
