"""Messages of `hybrid_attention`: what was expected, and what it got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, make, state_of

from lolcats.ops import IMPLEMENTATIONS, HybridSpec, hybrid_attention, resolve_impl

CASE = Case(6, 2, groups=2)  # B 2, H 4, KV 2, N 6, D 4, Dv 3, F 3


def call(**changes: Any) -> None:
    """Call with valid arguments, some of them replaced."""
    arguments: dict[str, Any] = {k: v for k, v in make(CASE)._asdict().items() if v is not None}
    arguments |= {"window": 2, **changes}
    spec = HybridSpec(**{name: arguments.pop(name) for name in HybridSpec._fields if name in arguments})
    hybrid_attention(features=(arguments.pop("phi_q"), arguments.pop("phi_k")), spec=spec, **arguments)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "q of 3 dimensions": (
        {"q": zeros(2, 6, 4)},
        r"q with 4 dimensions \[batch, heads, tokens, size\]; got \(2, 6, 4\)",
    ),
    "v of 3 dimensions": ({"v": zeros(2, 6, 4)}, r"v with 4 dimensions"),
    "phi_k of 5 dimensions": ({"phi_k": zeros(2, 4, 6, 3, 1)}, r"phi_k with 4 dimensions .* got \(2, 4, 6, 3, 1\)"),
    "no tokens": ({"q": zeros(2, 4, 0, 4)}, r"at least one token; got 0"),
    "heads no multiple": ({"k": zeros(2, 3, 6, 4)}, r"query heads \(4\) to be a multiple of key heads; got 3"),
    "k of other size": ({"k": zeros(2, 2, 6, 5)}, r"k \(2, 2, 6, 4\); got \(2, 2, 6, 5\)"),
    "k of other length": ({"k": zeros(2, 2, 7, 4)}, r"k \(2, 2, 6, 4\); got \(2, 2, 7, 4\)"),
    "v of other length": ({"v": zeros(2, 2, 5, 3)}, r"v \(2, 2, 6\) and a value size; got \(2, 2, 5, 3\)"),
    "v of query heads": ({"v": zeros(2, 4, 6, 3)}, r"v \(2, 2, 6\).*got \(2, 4, 6, 3\)"),
    "phi_q of key heads": ({"phi_q": zeros(2, 2, 6, 3)}, r"phi_q \(2, 4, 6\) and a feature size; got \(2, 2, 6, 3\)"),
    "phi_k of 1 head": ({"phi_k": zeros(2, 1, 6, 3)}, r"phi_k \(2, 4, 6, 3\) or \(2, 2, 6, 3\); got \(2, 1, 6, 3\)"),
    "phi_k of other features": ({"phi_k": zeros(2, 4, 6, 2)}, r"phi_k .*; got \(2, 4, 6, 2\)"),
    "window_factor a key head": ({"window_factor": zeros(2)}, r"window_factor \(4,\); got \(2,\)"),
    "window kind": ({"window_kind": "slide"}, r"window_kind 'sliding' or 'terraced'; got 'slide'"),
    "negative window": ({"window": -1}, r"an integer window >= 0; got -1"),
    "terraced window 0": ({"window": 0, "window_kind": "terraced"}, r"an integer window >= 1; got 0"),
    "fold 0": ({"fold": 0}, r"an integer fold >= 1; got 0"),
    "window not an integer": ({"window": 2.0}, r"an integer window >= 0; got 2.0"),
    "negative sinks": ({"sinks": -1}, r"an integer number of sinks >= 0; got -1"),
    "softcap 0": ({"softcap": 0.0}, r"a softcap > 0, or None; got 0.0"),
    "learned sinks a key head": ({"sink_logits": zeros(2)}, r"sink_logits \(4,\); got \(2,\)"),
    "decay a key head": ({"log_decay": zeros(2, 2, 6)}, r"log_decay \(2, 4, 6\); got \(2, 2, 6\)"),
    "mask of other length": ({"attention_mask": zeros(2, 7)}, r"attention_mask \(2, 6\); got \(2, 7\)"),
    "segments of other batch": ({"segment_ids": zeros(1, 6)}, r"segment_ids \(2, 6\); got \(1, 6\)"),
    "segments and mask": ({"segment_ids": zeros(2, 6), "attention_mask": zeros(2, 6)}, r"segment_ids without"),
    "segments and state": ({"segment_ids": zeros(2, 6), "return_state": True}, r"segment_ids without .*return_state"),
    "implementation": ({"impl": "fast"}, r"impl must be one of 'auto', 'reference', 'chunked'.*; got 'fast'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "window": (lambda: state_of(make(CASE), CASE._replace(window=3), "chunked"), r"2 window slots; got 3"),
    "kind": (
        lambda: state_of(make(CASE), CASE._replace(kind="terraced"), "chunked"),
        r"2 window slots; got 4",
    ),
    "batch": (
        lambda: state_of(make(CASE._replace(batch=1)), CASE, "chunked"),
        r"a batch of 2; got \(1,\)",
    ),
    "sinks": (lambda: state_of(make(CASE), CASE._replace(sinks=1), "chunked"), r"0 sinks; got 1"),
    "decay": (lambda: state_of(make(CASE._replace(decay=True)), CASE, "chunked"), r"without decay"),
}


@pytest.mark.parametrize(("state", "message"), STATES.values(), ids=STATES.keys())
def test_state_of_another_call(state: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(initial_state=state())


def test_state_with_sinks_and_decay_is_asked_for() -> None:
    state = state_of(make(CASE), CASE, "chunked")
    with pytest.raises(ValueError, match=r"a state with 2 sinks; got 0"):
        call(initial_state=state, sinks=2)
    with pytest.raises(ValueError, match=r"a state with decay"):
        call(initial_state=state, log_decay=zeros(2, 4, 6))


def test_state_without_features() -> None:
    """The model's cache keeps no features in its ring; such a state belongs to `hybrid_step`."""
    state = state_of(make(CASE), CASE, "chunked")
    with pytest.raises(ValueError, match=r"a state whose window holds phi_k"):
        call(initial_state=state._replace(window=state.window._replace(phi_k=None)))


def test_segments_and_initial_state() -> None:
    with pytest.raises(ValueError, match=r"segment_ids without"):
        call(segment_ids=zeros(2, 6), initial_state=state_of(make(CASE), CASE, "chunked"))


def test_resolve_impl() -> None:
    assert [resolve_impl(name) for name in ("auto", *IMPLEMENTATIONS)] == ["auto", *IMPLEMENTATIONS]
    with pytest.raises(ValueError, match="'recurrent'"):
        resolve_impl("Recurrent")


def test_valid_arguments_are_valid() -> None:
    call()
