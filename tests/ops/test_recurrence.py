"""The recurrence: every implementation is the formula, with the contract of its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrence_cases import (
    DECAYING,
    FAMILIES,
    Tensors,
    assert_same,
    assert_same_state,
    gradients,
    make,
    run,
    run_with_state,
    scalar_truth,
)
from torch import Tensor

from lolcats.ops import RecurrentState, recurrence, recurrence_step
from lolcats.ops.recurrence import chunked

IMPLEMENTATIONS = ("reference", "chunked")
KINDS = [(family, False) for family in FAMILIES] + [(name, True) for name, (_, beta) in FAMILIES.items() if not beta]
"""Families, and whether they are normalised."""


def first_state(tensors: Tensors, normalised: bool) -> RecurrentState:
    """A state of three tokens, whose numbers are leaves."""
    batch, heads, _, features = tensors.k.shape
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(tensors.k.dtype).requires_grad_()

    kv, k_sum = uniform(batch, heads, features, 3), uniform(batch, heads, features)
    return RecurrentState(kv, k_sum if normalised else None, torch.full((batch,), 3))


def assert_equal_to_reference(tensors: Tensors, impl: str, **options: Any) -> None:
    """Outputs, states and gradients, also of and through the state."""
    before = first_state(tensors, options.get("normalised", False))
    leaves = [x for x in (*tensors, *before) if x is not None and x.requires_grad]
    results = []
    for name in (impl, "reference"):
        out, state = run_with_state(tensors, name, initial_state=before, **options)
        sums = [x for x in state[:2] if x is not None]
        results.append([out, *sums, *gradients([out, *sums], leaves)])
    for got, want in zip(*results, strict=True):
        assert_same(got, want, 1e-9)


@pytest.mark.parametrize("state_heads", [2, 4])
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_the_reference_is_the_formula(family: str, normalised: bool, state_heads: int) -> None:
    tensors = make(family, 5, state_heads=state_heads)
    assert_same(run(tensors, "reference", normalised=normalised).out[1], scalar_truth(tensors, normalised, 1))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_chunked_equals_the_reference(family: str, normalised: bool, n: int) -> None:
    tensors = make(family, n, state_heads=4 if n in (63, 65) else 2, batch=1)
    assert_equal_to_reference(tensors, "chunked", normalised=normalised)


@pytest.mark.parametrize("strength", [-20.0, -800.0, -torch.inf])
@pytest.mark.parametrize("family", DECAYING)
def test_strong_decays(family: str, strength: float) -> None:
    """No exponent overflows, and weak decays beside strong ones lose nothing."""
    tensors = make(family, 70, batch=1)
    assert tensors.log_decay is not None
    strong = torch.rand(tensors.log_decay.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    log_decay = tensors.log_decay.detach().masked_fill(strong, strength).requires_grad_()
    assert_equal_to_reference(tensors._replace(log_decay=log_decay), "chunked", normalised=not FAMILIES[family][1])


@pytest.mark.parametrize("family", DECAYING)
def test_strong_decays_in_float32(family: str) -> None:
    """A full decay in a chunk does not spoil the weak ones after it."""
    tensors = make(family, 70, dtype=torch.float32)
    assert tensors.log_decay is not None
    log_decay = tensors.log_decay.detach().clone()
    log_decay[:, :, ::7] = -800.0
    tensors = tensors._replace(log_decay=log_decay)
    want = run(tensors.map(Tensor.double), "reference").out.float()
    assert_same(run(tensors, "chunked").out, want, 2e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["delta", "gated_delta", "kda"])
def test_beta_of_zero_and_one(family: str, impl: str) -> None:
    """0 writes nothing; 1 writes what is then read with the same key."""
    tensors = make(family, 70)
    assert tensors.beta is not None
    out, state = run_with_state(tensors._replace(beta=torch.zeros_like(tensors.beta)), impl)
    assert bool((out == 0).all()) and bool((state.kv == 0).all())
    keys = tensors.k.repeat_interleave(2, 1)
    out = run(tensors._replace(q=keys, beta=torch.ones_like(tensors.beta)), impl).out
    assert_same(out, 0.7 * tensors.v.repeat_interleave(2, 1))


@pytest.mark.parametrize("cut", [1, 37, 64])
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_a_text_may_be_cut_anywhere(family: str, normalised: bool, cut: int) -> None:
    tensors = make(family, 70)
    want, last = run_with_state(tensors, "reference", normalised=normalised)
    for first, second in (("chunked", "chunked"), ("reference", "chunked")):
        head, state = run_with_state(tensors.tokens(0, cut), first, normalised=normalised)
        tail, state = run_with_state(tensors.tokens(cut), second, normalised=normalised, initial_state=state)
        assert_same(torch.cat([head, tail], 2), want)
        assert_same_state(state, last)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_padding_changes_nothing(family: str, normalised: bool, impl: str) -> None:
    """Left, right and both, whatever is there, also for gradients; a row of padding keeps its state."""
    tensors = make(family, 21)
    before = first_state(tensors, normalised)
    leaves = [x for x in tensors if x is not None]
    want, last = run_with_state(tensors, impl, normalised=normalised, initial_state=before)
    for left, right in ((9, 0), (0, 9), (3, 5)):
        mask = torch.zeros(2, 21 + left + right, dtype=torch.long)
        mask[:, left : left + 21] = 1
        options = {"normalised": normalised, "initial_state": before, "attention_mask": mask}
        out, state = run_with_state(tensors.padded(left, right), impl, **options)
        assert_same(out[:, :, left : left + 21], want)
        assert bool((out[:, :, :left] == 0).all()) and bool((out[:, :, left + 21 :] == 0).all())
        assert_same_state(state, last)
        for a, b in zip(gradients([state.kv], leaves[1:]), gradients([last.kv], leaves[1:]), strict=True):
            assert_same(a, b, 1e-9)
    mask[0] = 0
    out, state = run_with_state(tensors.padded(3, 5), impl, **{**options, "attention_mask": mask})
    assert bool((out[0] == 0).all())
    assert torch.equal(state.kv[0], before.kv[0]) and state.length.tolist() == [3, 24]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_packed_texts_are_separate(family: str, normalised: bool, impl: str) -> None:
    """A number that comes again is another text; negative numbers are padding."""
    tensors = make(family, 90, batch=1)
    ids = torch.tensor([4] * 3 + [0] * 50 + [-1] * 6 + [0] * 20 + [4] * 1 + [-7] * 10)[None]
    out = run(tensors, impl, segment_ids=ids, normalised=normalised).out
    want = torch.zeros_like(out)
    for begin, end in ((0, 3), (3, 53), (59, 79), (79, 80)):
        want[:, :, begin:end] = run(tensors.tokens(begin, end), "reference", normalised=normalised).out
    assert_same(out, want)


@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_steps_are_the_full_pass(family: str, normalised: bool) -> None:
    """A row that is not active gives 0 and keeps its state; the old state stays as it was."""
    tensors = make(family, 70).map(Tensor.detach)
    want, last = run_with_state(tensors, "chunked", normalised=normalised)
    _, state = run_with_state(tensors.tokens(0, 66), "chunked", normalised=normalised)
    for i in range(66, 70):
        q, k, v, log_decay, beta = tensors.tokens(i, i + 1)
        options = {"log_decay": log_decay, "beta": beta, "normalised": normalised, "scale": 0.7}
        copy = state.map(Tensor.clone)
        half, skipped = recurrence_step(q, k, v, state, active=torch.tensor([1, 0]), **options)
        out, new = recurrence_step(q, k, v, state, **options)
        assert all(map(torch.equal, state.tensors(), copy.tensors()))
        assert torch.equal(half[0], out[0]) and bool((half[1] == 0).all())
        for a, b, c in zip(skipped.tensors(), new.tensors(), state.tensors(), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], c[1])
        assert_same(out[:, :, 0], want[:, :, i])
        state = new
    assert_same_state(state, last)


@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_gradients_are_right(family: str, normalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against differences, over three chunks."""
    for name in ("CHUNK", "CHANNEL_CHUNK"):
        monkeypatch.setattr(chunked, name, 2)
    tensors = make(family, 5, batch=1, state_heads=4)
    before = first_state(tensors, normalised)
    leaves = [x for x in (*tensors, before.kv) if x is not None]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        state = before._replace(kv=values[-1])
        out, state = run_with_state(tensors.map(lambda _: next(given)), "chunked", normalised=normalised,
                                    initial_state=state)  # fmt: skip
        return out, state.kv

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_sums_are_float32(family: str, normalised: bool, impl: str) -> None:
    """For bfloat16 inputs, under autocast too: only the output is rounded."""
    tensors = make(family, 70, dtype=torch.bfloat16).map(Tensor.detach)
    want, last = run_with_state(tensors.map(Tensor.float), impl, normalised=normalised)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = run_with_state(tensors, impl, normalised=normalised)
        _, rounded = run_with_state(tensors, impl, normalised=normalised, state_dtype=torch.bfloat16)
        _, kept = run_with_state(tensors, impl, normalised=normalised, initial_state=rounded)
    assert out.dtype == torch.bfloat16 and state.kv.dtype == torch.float32
    assert torch.equal(out, want.bfloat16()) and torch.equal(state.kv, last.kv)
    assert torch.equal(rounded.kv, last.kv.bfloat16()) and kept.kv.dtype == torch.bfloat16
    assert rounded.nbytes - 16 == (state.nbytes - 16) // 2
    mixed = tensors._replace(k=tensors.k.double())
    assert run_with_state(mixed, impl, normalised=normalised)[1].kv.dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_divide_by_gives_zero(impl: str) -> None:
    tensors = make("mamba2", 20)
    k = tensors.k.detach().clone()
    k[:, :, :4] = 0.0
    k.requires_grad_()
    out = run(tensors._replace(k=k), impl, normalised=True).out
    assert bool((out[:, :, :4] == 0).all()) and bool((out[:, :, 4:] != 0).all())
    assert all(bool(g.isfinite().all()) for g in gradients([out], [tensors.q, k, tensors.v]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_not_a_number_is_not_hidden(impl: str) -> None:
    tensors = make("linear", 20)
    q = tensors.q.detach().clone()
    q[0, 0, 7, 0] = torch.nan
    out = run(tensors._replace(q=q), impl, normalised=True).out
    assert bool(out[0, 0, 7].isnan().all()) and int(out.isnan().sum()) == 3


def test_auto_is_chunked_without_a_gpu_and_scale_defaults_to_one() -> None:
    q, k, v = make("linear", 20)[:3]
    assert torch.equal(recurrence(q, k, v).out, recurrence(q, k, v, scale=1.0, impl="chunked").out)
