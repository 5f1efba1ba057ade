"""Near attention of key heads of several sizes at once is that of one size after the other: outputs and states."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lolcats.ops.near import NearSpec, NearState, near_attention, near_attentions
from lolcats.ops.near.quantize import PairCodec, measure_keys

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
HEADS, KV, SIZE, VALUE = 8, 4, 16, 16
SPLITS = {
    "four sizes": [(5, 3), (9, 0), (2, 12), (5, 3)],
    "no pairs": [(5, 0), (9, 0), (2, 0), (5, 0)],
}


class Case(NamedTuple):
    """A layer's key heads and how it sees its texts."""

    split: str = "four sizes"
    bits: int = 8
    lengths: bool = False
    reach: int | None = None
    """Also gives sinks queries of their own."""
    softcap: float | None = None
    """Also gives learned sinks."""
    sinks: int = 2

    def parts(self) -> tuple[tuple[NearSpec, tuple[int, ...]], ...]:
        """Each size with its heads."""
        sizes = SPLITS[self.split]
        return tuple(
            (NearSpec(window, self.sinks, pairs, None, self.softcap, self.reach),
             tuple(head for head, own in enumerate(sizes) if own == (window, pairs)))
            for window, pairs in dict.fromkeys(sizes)
        )  # fmt: skip


class Texts(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    score: Tensor


def texts(n: int, batch: int = 2) -> Texts:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)[:batch].to(DEVICE)

    return Texts(random(HEADS, n, SIZE), random(KV, n, SIZE), random(KV, n, VALUE), (2 * random(KV, n)).round() / 2)


def options(case: Case, x: Texts, n: int, of: Any = slice(None)) -> dict[str, Any]:
    """For key heads `of`, and their query heads."""
    queries = torch.arange(HEADS).view(KV, -1)[of].flatten().to(DEVICE)
    logits = torch.linspace(-1, 1, HEADS, device=DEVICE)[queries]
    lengths = torch.tensor([n, n // 2], device=DEVICE)[: x.q.shape[0]] if case.lengths else None
    return {
        "lengths": lengths, "sink_q": -x.q[:, queries] if case.reach else None, "return_state": True, "impl": "triton",
        "sink_logits": logits if case.softcap else None,
    }  # fmt: skip


def one_by_one(
    case: Case, x: Texts, codec: PairCodec | None, states: list[NearState] | None
) -> tuple[Tensor, list[NearState]]:
    """Each part by itself."""
    out = torch.empty(*x.q.shape[:3], VALUE, device=DEVICE)
    after = []
    for number, (spec, heads) in enumerate(case.parts()):
        at = list(heads)
        queries = torch.arange(HEADS).view(KV, -1)[at].flatten()
        own = None if codec is None else PairCodec(codec.bits, codec.key_map[:, at])
        found = near_attention(
            x.q[:, queries], x.k[:, at], x.v[:, at], spec, score=x.score[:, at] if spec.pairs else None, codec=own,
            initial_state=None if states is None else states[number], **options(case, x, x.q.shape[2], at),
        )  # fmt: skip
        assert found.state is not None
        out[:, queries] = found.out
        after.append(found.state)
    return out, after


@pytest.mark.parametrize(("batch", "cuts"), [(1, (1, 40)), (2, (140, 20))], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(lengths=True, reach=30),
        Case(bits=16, softcap=5.0, sinks=0),
        Case("no pairs"),
        pytest.param(Case(bits=4, lengths=True), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_several_sizes(case: Case, batch: int, cuts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that begins, and one that goes on; short and long ones choose their pairs in different ways."""
    from lolcats.ops.near.kernels import select

    whole, at = texts(sum(cuts), batch), 0
    key_map = measure_keys(whole.q, whole.k, torch.arange(SIZE, device=DEVICE))
    codec = None if case.bits == 16 else PairCodec(case.bits, key_map)
    want_states = states = None
    for n in cuts:
        monkeypatch.setattr(select, "SHORT", 8192 if n % 40 else 0)
        x = Texts(*(t[:, :, at : at + n] for t in whole))
        want, want_states = one_by_one(case, x, codec, want_states)
        found = near_attentions(
            x.q, x.k, x.v, case.parts(), score=None if case.split == "no pairs" else x.score, codec=codec,
            initial_states=states, **options(case, x, n),
        )  # fmt: skip
        assert found is not None
        out, states = found
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        assert states is not None
        for (spec, _), mine, its in zip(case.parts(), states, want_states, strict=True):
            assert (mine.kept is None) == (not spec.pairs)
            for a, b in zip(mine.in_order().tensors(), its.in_order().tensors(), strict=True):
                assert torch.equal(a, b) and a.dtype == b.dtype and a.is_contiguous()
        at += n


def test_where_each_size_runs_by_itself() -> None:
    """Training, one size, and forms in torch."""
    x, parts = texts(12), Case(bits=16).parts()
    assert near_attentions(*x[:3], parts, score=x.score, impl="triton") is not None
    assert near_attentions(*x[:3], parts, score=x.score, impl="chunked") is None
    assert near_attentions(*x[:3], parts[:1], score=x.score, impl="triton") is None
    learns = x.q.clone().requires_grad_()
    assert near_attentions(learns, x.k, x.v, parts, score=x.score, impl="triton") is None


def test_refusals() -> None:
    x, parts = texts(12), Case(bits=16).parts()
    for change, message in (
        ({"parts": parts[:-1]}, "each of 4 key heads in one part"),
        ({"parts": (*parts, parts[0])}, "each of 4 key heads in one part"),
        ({"score": None}, "scores with kept pairs"),
        ({"score": x.score[:, :2]}, "score "),
        ({"impl": "cuda"}, "impl 'auto'"),
    ):
        options: dict[str, Any] = {"parts": parts, "score": x.score, "impl": "triton"} | change
        with pytest.raises(ValueError, match=message):
            near_attentions(*x[:3], **options)
