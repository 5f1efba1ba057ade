"""The kernel's step of near attention is the step in torch, outputs and states, also on a GPU; and pools of states."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers import rows_apart
from torch import Tensor

from lolcats.ops.near import NearPart, NearSpec, NearState, empty_near_state, near_attention, near_step, near_steps
from lolcats.ops.near.quantize import PairCodec, measure_keys

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


class Texts(NamedTuple):
    """Tokens of three texts, as many as one asks for, and learned sinks."""

    q: Tensor
    k: Tensor
    v: Tensor
    score: Tensor
    logits: Tensor

    def step(self, i: int, state: NearState, spec: NearSpec, **options: Any) -> tuple[Tensor, NearState]:
        q, k, v, score = (x[:, :, i : i + 1] for x in self[:4])
        options["score"] = score if spec.pairs else None
        options["sink_logits"] = self.logits if spec.softcap else None
        options["sink_q"] = None if spec.reach is None else -q
        return near_step(q, k, v, state, spec, **options)


def texts(n: int) -> Texts:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator).to(DEVICE)

    logits = torch.linspace(-1, 1, 2, device=DEVICE)
    score = (2 * random(1, n)).round() / 2  # some are equal
    return Texts(random(2, n, 20), random(1, n, 20), random(1, n, 17), score, logits)


def begun(x: Texts, n: int, spec: NearSpec) -> NearState:
    """The state after n tokens of each text."""
    if n == 0:
        return empty_near_state(x.k, x.v, spec)
    score, logits = x.score[:, :, :n] if spec.pairs else None, x.logits if spec.softcap else None
    q, k, v = (t[:, :, :n] for t in x[:3])
    state = near_attention(
        q, k, v, spec, score=score, sink_logits=logits, return_state=True, impl="chunked"
    ).state  # fmt: skip
    assert state is not None
    return state


def assert_same(got: NearState, want: NearState) -> None:
    """Equal but for the order of kept pairs."""
    for a, b in zip(_ordered(got), _ordered(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def _ordered(state: NearState) -> list[Tensor]:
    if state.kept is None:
        return state.tensors()
    filled = state.kept.score > -torch.inf
    order = torch.where(filled, state.kept.position, -1).argsort(-1)
    kept = [x.gather(2, order[..., None].expand_as(x)) for x in state.kept[:2]]
    score, position, filled = (x.gather(2, order) for x in (*state.kept[2:], filled))
    return [*state._replace(kept=None).tensors(), score, *(x * filled[..., None] for x in kept), position * filled]


CASES = [
    (NearSpec(3, 2, 3), 0, 10),
    (NearSpec(1, 0, 2, softcap=2.0), 0, 4),
    (NearSpec(70, 2, 130), 230, 234),
    (NearSpec(4, 6, softcap=1.0), 3, 8),
    (NearSpec(3, 2, 8, reach=9), 0, 16),
]


@pytest.mark.parametrize(("spec", "start", "end"), CASES, ids=str)
@torch.no_grad()
def test_the_step_in_torch(spec: NearSpec, start: int, end: int) -> None:
    """At some steps, in some rows, there is padding."""
    x = texts(end)
    plain = begun(x, start, spec)
    fused = plain.map(lambda t: t.clone())
    addresses = [t.data_ptr() for t in fused.tensors()]
    for i in range(start, end):
        active = None
        if i % 2:  # as the model gives it: a column of a wider mask
            active = ((torch.arange(3, device=DEVICE) + i) % 3)[:, None].repeat(1, 4)[:, -1]
        want, plain = x.step(i, plain, spec, active=active, impl="chunked")
        got, fused = x.step(i, fused, spec, active=active, impl="triton", donate=True)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        assert_same(fused, plain)
    assert addresses == [t.data_ptr() for t in fused.tensors()]


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_pairs_in_fewer_bits(bits: int) -> None:
    """As in torch, byte by byte; in a pool too, of which one row has no text."""
    x = texts(14)
    x = x._replace(v=x.v[..., :14])
    codec = PairCodec(bits, measure_keys(x.q, x.k, torch.arange(20, device=DEVICE).roll(10)))
    spec = NearSpec(4, 2, 3, softcap=2.0, reach=8)
    plain = codec.encode_state(empty_near_state(x.k, x.v, spec))
    pool = rows_apart(plain.map(lambda t: torch.cat([t, t])))
    places = torch.tensor([5, 0, 3], device=DEVICE)
    for i in range(14):
        held = torch.arange(3, device=DEVICE) != i % 5
        want, plain = x.step(i, plain, spec, active=held, impl="chunked", codec=codec)
        indices = torch.where(held, places, -1)
        got, _ = x.step(i, pool, spec, impl="triton", codec=codec, state_indices=indices)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        found = _ordered(pool.map(lambda t: t[places]))
        assert all(torch.equal(a, b) for a, b in zip(found, _ordered(plain), strict=True))


@pytest.mark.parametrize("bits", [16, 8])
@torch.no_grad()
def test_key_heads_of_several_sizes_at_once(bits: int) -> None:
    """In one call as each by itself, whatever their order; values of a power of two are mixed back in the kernel."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, score = (
        torch.randn(2, h, 12, *size, generator=generator).to(DEVICE) for h, *size in ((8, 32), (4, 32), (4, 16), (4,))
    )
    specs = {(0, 2): NearSpec(3, 2, 5), (3,): NearSpec(70, 2), (1,): NearSpec(1, 2, 66)}
    codec = None if bits == 16 else PairCodec(8, measure_keys(q, k, torch.arange(32, device=DEVICE).roll(16)))
    codecs = {heads: None if codec is None else PairCodec(8, codec.key_map[:, list(heads)]) for heads in specs}
    states = {heads: empty_near_state(k[:, list(heads)], v[:, list(heads)], spec) for heads, spec in specs.items()}
    states = {
        heads: state if (own := codecs[heads]) is None else own.encode_state(state) for heads, state in states.items()
    }
    parts = [NearPart(spec, states[heads].map(lambda t: t.clone()), heads) for heads, spec in specs.items()]
    for i in range(12):
        one_q, one_k, one_v, mark = (x[:, :, i : i + 1] for x in (q, k, v, score))
        stored = (one_k, one_v) if codec is None else codec.encode(one_k, one_v)
        done = near_steps(one_q, *stored, parts, score=mark, donate=True, codec=codec, impl="triton")
        assert done is not None
        for part, new in zip(parts, done[1], strict=True):
            heads, two = list(part.heads), [h for head in part.heads for h in (2 * head, 2 * head + 1)]
            want, states[part.heads] = near_step(
                one_q[:, two], one_k[:, heads], one_v[:, heads], states[part.heads], part.spec, impl="chunked",
                score=mark[:, heads] if part.spec.pairs else None, codec=codecs[part.heads],
            )  # fmt: skip
            torch.testing.assert_close(done[0][:, two], want, rtol=2e-5, atol=2e-5)
            assert_same(new, states[part.heads])


@pytest.mark.parametrize(
    ("size", "value_size", "group", "dtype"),
    [
        pytest.param(20, 12, 1, torch.float16, marks=pytest.mark.exhaustive),
        (64, 64, 3, torch.bfloat16),
        (128, 36, 9, torch.float16),
        pytest.param(100, 128, 2, torch.float16, marks=pytest.mark.exhaustive),
    ],
)
@torch.no_grad()
def test_bytes_in_products_of_16_bits(size: int, value_size: int, group: int, dtype: torch.dtype) -> None:
    """As in float32 but for rounding, with queries that are 0, tiny or large, and steps that differ by much."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, score = (
        torch.randn(2, h, 90, *n, generator=generator)
        for h, *n in ((2 * group, size), (2, size), (2, value_size), (2,))
    )
    k, v = k * torch.logspace(-2, 1, 90)[:, None], v * torch.logspace(1, -3, 90)[:, None]
    q[:, 0, 80:] *= torch.logspace(-7, 1, 10)[:, None]
    q[:, -1, 85] = 0
    q, k, v, score = (x.to(dtype).to(DEVICE) for x in (q, k, v, score))
    codec = PairCodec(8, measure_keys(q.float(), k.float(), torch.arange(size, device=DEVICE).roll(size // 2)))
    spec = NearSpec(3, 2, 66, softcap=4.0 if group == 3 else None)
    plain = near_attention(
        q[:, :, :80].float(), k[:, :, :80].float(), v[:, :, :80].float(), spec, score=score[:, :, :80].float(),
        return_state=True, impl="chunked", codec=codec,
    ).state  # fmt: skip
    assert plain is not None
    pool = rows_apart(plain.map(lambda t: t.clone()))
    places = torch.arange(2, device=DEVICE)
    for i in range(80, 90):
        one_q, one_k, one_v, mark = (x[:, :, i : i + 1] for x in (q, k, v, score))
        want, plain = near_step(
            one_q.float(), one_k.float(), one_v.float(), plain, spec, score=mark.float(), sink_q=-one_q.float(),
            codec=codec, impl="chunked",
        )  # fmt: skip
        got, _ = near_step(
            one_q, one_k, one_v, pool, spec, score=mark, sink_q=-one_q, codec=codec, state_indices=places,
            impl="triton",
        )  # fmt: skip
        error = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(error.max()) < (2e-2 if dtype == torch.bfloat16 else 6e-3)


@pytest.mark.parametrize(("impl", "apart"), [("triton", False), ("triton", True), ("chunked", True)])
@torch.no_grad()
def test_a_pool_of_states(impl: str, apart: bool) -> None:
    """Rows of a pool of six, in any order, are stepped as a batch is; no other row is touched, nor read."""
    spec, x = NearSpec(4, 2, 3), texts(16)
    plain = begun(x, 8, spec)
    pool = plain.map(lambda t: torch.full_like(torch.cat([t, t]), 7))
    pool = rows_apart(pool) if apart else pool
    places = torch.tensor([4, 1, 2], device=DEVICE)
    for held, rows in zip(pool.tensors(), plain.tensors(), strict=True):
        held[places] = rows
    for i in range(8, 16):
        pauses = i % 4  # 3: none
        indices = torch.where(torch.arange(3, device=DEVICE) == pauses, -1, places)
        indices = indices.to((torch.int32, torch.int64)[i // 4 % 2])
        want, plain = x.step(i, plain, spec, active=indices >= 0, impl="chunked")
        before = pool.map(lambda t: t.clone())
        got, same = x.step(i, pool, spec, impl=impl, state_indices=indices)
        assert same is pool
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        others = [row for row in range(6) if row not in indices.tolist()]
        for held, old in zip(pool.tensors(), before.tensors(), strict=True):
            assert torch.equal(held[others], old[others])
        assert_same(pool.map(lambda t: t[places]), plain)


@pytest.mark.parametrize("impl", ["triton", "chunked"])
@torch.no_grad()
def test_a_state_that_is_not_given_away_stays(impl: str) -> None:
    spec, x = NearSpec(3, 1, 2), texts(7)
    state = begun(x, 6, spec)
    before = state.map(lambda t: t.clone())
    first, new = x.step(6, state, spec, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors(), strict=True))
    again, _ = x.step(6, state, spec, impl=impl)
    assert torch.equal(first, again) and new.length.tolist() == [7, 7, 7]


def test_refused() -> None:
    spec, x = NearSpec(3, 1, 2), texts(2)
    state = begun(x, 1, spec)
    pool = state.map(lambda t: torch.stack([t, t], -1)[..., 0])
    exact = state._replace(kept=state.kept and state.kept._replace(score=state.kept.score.double()))
    calls: list[tuple[Texts, NearState, dict[str, Any], str]] = [
        (x._replace(q=x.q.half()), state, {}, "queries and values of one dtype"),
        (x._replace(k=x.k.clone().requires_grad_()), state, {}, "no gradients; decode under"),
        (x, exact, {}, "scores of float32 in the state; got torch.float64"),
        (x, pool, {"state_indices": torch.arange(3, device=DEVICE)}, "a pool of contiguous rows; use impl 'auto'"),
    ]
    for tokens, held, options, message in calls:
        with pytest.raises(ValueError, match=message):
            tokens.step(1, held, spec, impl="triton", **options)
