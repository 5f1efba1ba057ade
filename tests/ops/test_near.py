"""Near attention: blocks and steps are the literal definition, whatever the sizes, cuts and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.ops.near import NearSpec, NearState, empty_near_state, near_attention, near_step
from lolcats.ops.near.blocks import BLOCK
from lolcats.ops.near.selection import by_kernel, select_pairs

near: Any = near_attention  # of which tests unpack lists of tensors
step: Any = near_step
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
SPECS = [
    NearSpec(window=4, sinks=2, pairs=3),
    NearSpec(window=1, sinks=0, pairs=2),
    NearSpec(window=5, sinks=7, pairs=40, softcap=3.0),
    NearSpec(window=9, sinks=1),
    NearSpec(window=200, sinks=4, pairs=5, scale=0.7),
    NearSpec(window=4, sinks=3, pairs=20, reach=30),
]


def tensors(n: int, batch: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    return random(heads, n, 6), random(kv_heads, n, 6), random(kv_heads, n, 3), random(kv_heads, n)


def logits(spec: NearSpec) -> Tensor | None:
    return torch.linspace(-1, 1, 4, dtype=torch.float64) if spec.softcap else None


def others(spec: NearSpec, q: Tensor) -> Tensor | None:
    """Queries of their own for sinks, where the reach of the model counts."""
    return None if spec.reach is None else q.flip(2, 3)


def marks(spec: NearSpec, score: Tensor) -> Tensor | None:
    return score if spec.pairs else None


def part(x: Tensor | None, a: int, b: int) -> Tensor | None:
    return None if x is None else x[:, :, a:b]


def steps(q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, spec: NearSpec, state: NearState) -> Any:
    outputs = []
    for i in range(q.shape[2]):
        one = [x[:, :, i : i + 1] for x in (q, k, v)]
        out, state = step(
            *one, state, spec, score=part(score, i, i + 1), sink_logits=logits(spec),
            sink_q=part(others(spec, q), i, i + 1),
        )  # fmt: skip
        outputs.append(out)
    return torch.cat(outputs, 2), state


@pytest.mark.parametrize("n", [1, 2, 17, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_blocks_are_the_definition(spec: NearSpec, n: int) -> None:
    q, k, v, score = tensors(n, batch=1 if n > 100 else 2)
    for x in (q, k, v):
        x.requires_grad_()
    seed = torch.randn(q.shape[0], 4, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    results = []
    for impl in ("reference", "chunked"):
        extra = {"sink_logits": logits(spec), "sink_q": others(spec, q)}
        out = near(q, k, v, spec, score=marks(spec, score), impl=impl, **extra).out
        results.append((out, *torch.autograd.grad((out * seed).sum(), (q, k, v))))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.no_grad()
def test_cut_anywhere_and_step_by_step(spec: NearSpec) -> None:
    n = BLOCK + 30
    q, k, v, score = tensors(n)
    marked, extra = marks(spec, score), {"sink_logits": logits(spec)}
    own = others(spec, q)
    whole = near(q, k, v, spec, score=marked, return_state=True, sink_q=own, **extra)
    for cut in (1, 3, 40, BLOCK, n - 1):
        first = near(*(x[:, :, :cut] for x in (q, k, v)), spec, score=part(marked, 0, cut),
                               return_state=True, sink_q=part(own, 0, cut), **extra)  # fmt: skip
        rest = near(*(x[:, :, cut:] for x in (q, k, v)), spec, score=part(marked, cut, n), initial_state=first.state,
                              return_state=True, sink_q=part(own, cut, n), **extra)  # fmt: skip
        torch.testing.assert_close(torch.cat([first.out, rest.out], 2), whole.out, **EXACT)
        same(rest.state, whole.state)
    out, state = steps(q, k, v, marked, spec, empty_near_state(k, v, spec))
    torch.testing.assert_close(out, whole.out, **EXACT)
    same(state, whole.state)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.pairs], ids=str)
@torch.no_grad()
def test_equal_scores_in_parts_and_steps(spec: NearSpec) -> None:
    """The earlier pair stays, whatever slots the pairs are in."""
    n = 60
    q, k, v, score = tensors(n)
    score = score.round()
    extra = {"sink_logits": logits(spec)}
    whole = near(q, k, v, spec, score=score, sink_q=others(spec, q), **extra).out
    torch.testing.assert_close(steps(q, k, v, score, spec, empty_near_state(k, v, spec))[0], whole, **EXACT)
    for cut in (20, 41):
        first_q, first_k, first_v, first_score = (x[:, :, :cut] for x in (q, k, v, score))
        state = steps(first_q, first_k, first_v, first_score, spec, empty_near_state(k, v, spec))[1]
        rest = near(*(x[:, :, cut:] for x in (q, k, v)), spec, score=score[:, :, cut:], initial_state=state,
                    sink_q=part(others(spec, q), cut, n), **extra).out  # fmt: skip
        torch.testing.assert_close(rest, whole[:, :, cut:], **EXACT)


def same(x: NearState | None, y: NearState | None) -> None:
    assert x is not None and y is not None
    assert x.length.tolist() == y.length.tolist()
    if x.kept is not None and y.kept is not None:
        for a, b in zip(sorted_kept(x.kept), sorted_kept(y.kept), strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    for a, b in zip(x.ring, y.ring, strict=True):
        if a is not None and int(x.length[0]) >= a.shape[2]:
            torch.testing.assert_close(a, b, **EXACT)


def sorted_kept(kept: Any) -> list[Tensor]:
    """Pairs in the order of their scores, empty slots at 0."""
    score, order = kept.score.sort(-1)
    filled = score > -torch.inf
    found = [x.gather(2, order[..., None].expand_as(x)) * filled[..., None] for x in (kept.k, kept.v)]
    return [*found, score, kept.position.gather(2, order) * filled]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.no_grad()
def test_padding_on_the_right(spec: NearSpec) -> None:
    n, lengths = 150, torch.tensor([150, 0, 1, 139])
    q, k, v, score = tensors(n, batch=4)
    marked, extra = marks(spec, score), {"sink_logits": logits(spec)}
    padded = near(q, k, v, spec, score=marked, lengths=lengths, return_state=True, **extra)
    assert padded.state is not None and padded.state.length.tolist() == lengths.tolist()
    assert padded.out.isfinite().all()
    for row, end in enumerate(lengths.tolist()):
        assert not padded.out[row, :, end:].any()
        if end:
            alone = near(
                *(x[row : row + 1, :, :end] for x in (q, k, v)), spec,
                score=None if marked is None else marked[row : row + 1, :, :end], return_state=True, **extra,
            )  # fmt: skip
            torch.testing.assert_close(padded.out[row : row + 1, :, :end], alone.out, **EXACT)
            later = tensors(9, batch=4, seed=3)
            outs = []
            for state, rows in ((padded.state, slice(row, row + 1)), (alone.state, slice(0, 1))):
                one = state.map(lambda t, rows=rows: t[rows])
                x = [t[row : row + 1] for t in later]
                outs.append(near(*x[:3], spec, score=marks(spec, x[3]), initial_state=one, **extra).out)
            torch.testing.assert_close(*outs, **EXACT)


@torch.no_grad()
def test_a_row_without_a_token_steps_over_it() -> None:
    spec = SPECS[0]
    q, k, v, score = tensors(20)
    _, state = steps(q, k, v, score, spec, empty_near_state(k, v, spec))
    one = [x[:, :, :1] for x in tensors(1, seed=4)]
    out, after = step(*one[:3], state, spec, score=one[3], active=torch.tensor([1, 0]))
    assert not out[1].any() and after.length.tolist() == [21, 20]
    assert after.kept is not None and state.kept is not None and torch.equal(after.kept.k[1], state.kept.k[1])


@pytest.mark.parametrize(
    ("pairs", "n", "block", "levels"),
    [
        (5, 70, 64, 0),
        (16, 64, 32, 1),
        (40, 130, 128, 1),
        (3, 10, 32, 2),
        (1030, 70, 32, 0),
        pytest.param(2050, 40, 32, 1, marks=pytest.mark.exhaustive),
        (20, 300, 32, 1),
    ],
)
@pytest.mark.parametrize(("short", "shortest"), [(10**6, 0), (0, 10**6), (0, 1)])
def test_the_kernels_of_the_selection(
    pairs: int, n: int, block: int, levels: int, short: int, shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pairs, also where scores are equal or minus infinity; of a fresh text empty ones come last, then surplus
    ones.

    Long texts in one segment, and in as many as there are blocks.
    """
    from lolcats.ops.near.kernels import select as kernels

    monkeypatch.setattr(kernels, "SHORTEST_SEGMENT", shortest)
    monkeypatch.setattr(kernels, "SHORT", short)
    generator = torch.Generator().manual_seed(1)
    leaving, held = (torch.randn(2, 2, m, generator=generator) for m in (n, pairs))
    if levels:
        leaving, held = (leaving * levels).round(), (held * levels).round()
    held[0, :, pairs // 2 :] = leaving[1, :, 3:9] = -torch.inf
    want = select_pairs(held, leaving, block)
    scores = torch.cat([held, leaving], -1)
    before, until, after = (x.long() for x in by_kernel(kernels.select, scores, pairs, block, None))
    assert torch.equal(before.sort(-1).values, want.before.sort(-1).values)
    assert torch.equal(after.sort(-1).values, want.after.sort(-1).values)
    # A pair that is gone when it comes was never there, whatever number says so.
    comes = torch.cat([torch.full((pairs,), -1), torch.arange(n)])
    pair = scores > -torch.inf
    assert torch.equal(torch.maximum(until, comes)[pair], torch.maximum(want.until, comes)[pair])
    fresh = torch.cat([torch.full_like(held, -torch.inf), leaving], -1)
    fresh[:, :, pairs : pairs + 2] = -torch.inf  # sinks
    before = by_kernel(kernels.select, fresh, pairs, block, None).before.long()
    empty = fresh[:, :, None].expand(-1, -1, before.shape[2], -1).gather(3, before) == -torch.inf
    assert not (empty[..., :-1] & ~empty[..., 1:]).any()
    surplus = torch.tensor([[0], [pairs // 3]])
    fresh[:, 1, : pairs // 3] = torch.inf
    want = select_pairs(fresh[..., :pairs], fresh[..., pairs:], block, surplus)
    got = by_kernel(kernels.select, fresh, pairs, block, surplus)
    for mine, its in ((got.before, want.before), (got.after, want.after)):
        assert torch.equal(mine.long().sort(-1).values, its.sort(-1).values)
        assert (mine[:, 1, ..., pairs - pairs // 3 :] < pairs // 3).all()


def test_gradients() -> None:
    q, k, v, score = tensors(9, batch=1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: near(*x, SPECS[0], score=score).out, inputs)


def test_bfloat16_is_summed_in_float32() -> None:
    spec = NearSpec(window=64, pairs=8)
    exact = tensors(300, batch=1)
    short = [x.to(torch.bfloat16) for x in exact[:3]]
    want = near(*(x.double() for x in short), spec, score=exact[3]).out
    got = near(*short, spec, score=exact[3]).out
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2**-8)


def test_refusals() -> None:
    q, k, v, score = tensors(5)
    for change, message in (
        ({"spec": NearSpec(window=0)}, "a window of at least 1"),
        ({"spec": NearSpec(pairs=2), "score": None}, "scores with kept pairs"),
        ({"score": score[:, :1]}, "score \\(2, 2, 5\\)"),
        ({"lengths": torch.zeros(3)}, "lengths \\(2,\\)"),
        ({"impl": "fast"}, "impl"),
    ):
        arguments: dict[str, Any] = {"spec": SPECS[0], "score": score, **change}
        with pytest.raises(ValueError, match=message):
            near(q, k, v, **arguments)
