"""What kernels prepare of a decoding step is what the codec and the score make in torch; on a CPU interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lolcats.mixers import Call, Sizes
from lolcats.mixers.rotation import Layout, Reach, Rotation, layouts
from lolcats.mixers.scores import RESOLUTION, KeyScores
from lolcats.ops.near.prepare import prepare_refusal, prepare_step
from lolcats.ops.near.prepared import Prepared, ScoreCall, ScoreWeights, SinkCall
from lolcats.ops.near.quantize import PairCodec, measure_keys, spread

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SCRIPT = Path(__file__).with_name("compile_prepare.py")
HALF = Layout("half")
ROOM = 3
"""Rows of a pool beside those of the texts."""


class Case(NamedTuple):
    """Sizes of one step."""

    batch: int = 1
    groups: int = 1
    kv_heads: int = 1
    size: int = 16
    value_size: int = 16
    hidden: int = 48
    layout: Layout | None = HALF
    angles: int = 16
    """P."""
    coded: bool = True
    scored: bool = True
    fade: int | None = 700
    pooled: bool = False
    sinks: bool = False
    """Queries for them are wanted, of a model whose context some texts are longer than."""
    dtype: torch.dtype = torch.float32


class Step(NamedTuple):
    """A token of each text, laid out as by a layer, and what there is of it."""

    call: Call
    scores: KeyScores
    codec: PairCodec
    length: Tensor
    indices: Tensor | None

    def score_call(self) -> ScoreCall:
        """As a layer asks for its score."""
        network, rotation = self.scores.network, self.call.rotation
        assert network is not None
        weights = ScoreWeights(
            network.read_hidden.weight, network.read_hidden.bias, network.read_pair.weight, network.read_pair.bias,
            network.from_hidden.weight, network.from_hidden.bias, network.from_pair.weight,
        )  # fmt: skip
        cos, sin, layout = (None, None, None) if rotation is None else rotation
        return ScoreCall(self.call.hidden, weights, self.scores.mix, self.scores.fade, RESOLUTION, cos, sin, layout)

    @property
    def positions(self) -> Tensor:
        """[B], of the tokens."""
        return self.length if self.indices is None else self.length[self.indices]

    def reach(self) -> Reach:
        """The longest text is at its end: the next token is beyond."""
        assert self.call.rotation is not None
        layout = self.call.rotation.layout._replace(angles="single")
        half = self.call.rotation._angles(self.call.rotation.cos).shape[-1]
        angle = torch.linspace(-3, 3, half, device=DEVICE)[None, None]
        last = Rotation(angle.cos() * 1.1, angle.sin() * 1.1, layout)
        return Reach(int(self.positions.max()), last)

    def sink_call(self) -> SinkCall:
        """As a layer asks for its queries."""
        assert self.call.rotation is not None
        reach = self.reach()
        return SinkCall(*self.call.rotation, reach.rotation.cos, reach.rotation.sin, reach.tokens)

    @torch.no_grad()
    def prepared(self, case: Case) -> Prepared:
        """By the kernels."""
        score = self.score_call() if case.scored else None
        return prepare_step(
            self.call.q, self.call.k, self.call.v, codec=self.codec if case.coded else None, score=score,
            length=self.length, state_indices=self.indices, sinks=self.sink_call() if case.sinks else None,
        )  # fmt: skip

    @torch.no_grad()
    def in_torch(self, case: Case) -> Prepared:
        """As the layer does it."""
        call, codec, score, sink_q = self.call, self.codec, None, None
        if case.scored:
            k = call.k if call.rotation is None else call.rotation.undo(call.k)
            score = self.scores(call, k, self.positions[:, None], 1, lambda: k)
        if case.sinks:
            assert call.rotation is not None
            reach = self.reach()
            beyond = (self.positions >= reach.tokens)[:, None, None, None]
            assert bool(beyond.any()) and (case.batch == 1 or not bool(beyond.all()))
            sink_q = torch.where(beyond, reach.capped(call.q, call.rotation), call.q)
        if not case.coded:
            return Prepared(call.q, call.k, call.v, score, sink_q)
        sink_q = None if sink_q is None else codec.map_queries(sink_q)
        return Prepared(codec.map_queries(call.q), *codec.encode(call.k, call.v), score, sink_q)


def make(case: Case) -> Step:
    """Random numbers; the first two channels of keys are large, and one of the layer's input."""
    generator = torch.Generator().manual_seed(case.batch + case.size)

    def random(*shape: int) -> Tensor:
        return torch.randn(case.batch, *shape, generator=generator)

    heads = case.groups * case.kv_heads
    q, k, v = (
        random(1, count, size).to(DEVICE, case.dtype).transpose(1, 2)
        for count, size in ((heads, case.size), (case.kv_heads, case.size), (case.kv_heads, case.value_size))
    )
    k[..., :2] *= 20
    hidden = random(1, case.hidden) + 0.5
    hidden[..., 3] *= 30
    rotation = None
    if case.layout is not None:
        turns, scale = random(1, case.angles), 1.1  # some families scale
        rotation = Rotation((turns.cos() * scale).to(DEVICE), (turns.sin() * scale).to(DEVICE), case.layout)
    call = Call(q, k, v, hidden.to(DEVICE, case.dtype), 1.0, rotation=rotation)
    torch.manual_seed(1)
    sizes = Sizes(heads, case.kv_heads, case.size, case.value_size, case.hidden)
    scores = KeyScores(sizes, "learned", 0.3, case.fade, False).to(DEVICE)
    codec = PairCodec(8, measure_keys(q, k, torch.arange(case.size, device=DEVICE).roll(case.size // 2)))
    length = torch.randint(0, 100_000, (case.batch + ROOM,), generator=generator).to(DEVICE)
    if not case.pooled:
        return Step(call, scores, codec, length[: case.batch], None)
    places = torch.randperm(case.batch + ROOM, generator=generator)[: case.batch]
    return Step(call, scores, codec, length, places.to(DEVICE))


def assert_same(got: Prepared, want: Prepared) -> None:
    """Bit by bit; scores but for the last digit, where what is rounded lies on an edge."""
    # The interpreter cuts off the digits that bfloat16 does not hold, instead of rounding.
    cut_off = DEVICE == "cpu" and want.q.dtype == torch.bfloat16
    assert (got.sink_q is None) == (want.sink_q is None)
    if got.sink_q is not None and want.sink_q is not None and cut_off:  # twice before they are mixed
        torch.testing.assert_close(got.sink_q, want.sink_q, rtol=2.0**-7, atol=2.0**-5 * float(want.sink_q.abs().max()))
        got, want = got._replace(sink_q=None), want._replace(sink_q=None)
    pairs = [(a, b) for a, b in zip((*got[:3], got.sink_q), (*want[:3], want.sink_q), strict=True)]
    for a, b in pairs:
        if a is None or b is None:
            continue
        assert a.dtype == b.dtype
        if cut_off and a.dtype == torch.bfloat16:
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=0)
        else:
            assert torch.equal(a, b)
    assert (got.score is None) == (want.score is None)
    if got.score is not None and want.score is not None:
        assert got.score.dtype == want.score.dtype and got.score.shape == want.score.shape
        apart = (got.score - want.score).abs() * RESOLUTION
        assert float(apart.max()) <= (8 if cut_off else 1.01)
        assert cut_off or float((apart > 0).float().mean()) < 0.1


CASES = [
    Case(),
    Case(2, 3, 3, 64, 64, 70, angles=64),
    Case(1, 4, 8, 128, 128, 150, angles=128, dtype=torch.bfloat16),
    Case(2, 3, 3, 64, 32, 70, angles=64, fade=None, dtype=torch.float16),
    Case(5, 4, 1, 64, 64, 33, angles=64, pooled=True, dtype=torch.bfloat16),
    Case(17, 1, 1, 16, 16, 33, layout=None, coded=False),
    Case(2, 3, 3, 64, 64, coded=False, angles=64, pooled=True),
    Case(2, 3, 3, 64, 64, scored=False),
    Case(1, 4, 1, coded=False, scored=False),
    Case(2, 3, 3, 64, 64, 70, angles=64, sinks=True),
    Case(5, 4, 1, 64, 64, 33, angles=64, pooled=True, sinks=True, dtype=torch.bfloat16),
    Case(2, 3, 3, 64, 64, angles=64, scored=False, sinks=True, dtype=torch.float16),
    Case(3, 3, 2, 64, 64, 33, angles=32, coded=False, sinks=True),
    Case(3, 4, 1, coded=False, scored=False, sinks=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_codec_and_the_score_in_torch(case: Case) -> None:
    step = make(case)
    assert_same(step.prepared(case), step.in_torch(case))


TURNS = [(layout, angles) for angles in (4, 8) for layout in layouts(angles, 16)]


@pytest.mark.parametrize(("layout", "angles"), TURNS, ids=str)
def test_every_way_to_rotate(layout: Layout, angles: int) -> None:
    """All texts may have one rotation."""
    case = Case(3, layout=layout, angles=angles, coded=False, sinks=True)
    step = make(case)
    assert_same(step.prepared(case), step.in_torch(case))
    rotation = step.call.rotation
    assert rotation is not None
    step.call.rotation = rotation._replace(cos=rotation.cos[:1], sin=rotation.sin[:1])
    assert_same(step.prepared(case), step.in_torch(case))


def test_rows_without_a_text() -> None:
    """They change nothing of others, and nothing outside the pool is read for them."""
    case = Case(5, pooled=True)
    step = make(case)
    want = step.in_torch(case)
    assert step.indices is not None
    few = step._replace(indices=torch.where(torch.arange(5, device=DEVICE) % 2 == 0, step.indices, -1).int())
    assert_same(*(Prepared(*(x if x is None else x[::2] for x in all_)) for all_ in (few.prepared(case), want)))  # type: ignore[arg-type]


def test_a_map_that_changes_is_seen() -> None:
    case = Case(scored=False)
    step = make(case)
    before = step.prepared(case)
    step.codec.key_map.copy_(measure_keys(-step.call.k, step.call.k.roll(1, -1), torch.arange(16, device=DEVICE)))
    after = step.prepared(case)
    assert not torch.equal(before.k, after.k)
    assert_same(after, step.in_torch(case))


def test_a_text_has_its_score_in_every_batch() -> None:
    """Bit by bit; as the other texts have in a batch of which it is the last."""
    case = Case(18, coded=False, hidden=33)
    step = make(case)
    together = step.prepared(case)
    call = step.call
    assert call.rotation is not None
    rotation = call.rotation._replace(cos=call.rotation.cos[17:], sin=call.rotation.sin[17:])
    alone = Call(call.q[17:], call.k[17:], call.v[17:], call.hidden[17:], 1.0, rotation=rotation)
    one = step._replace(call=alone, length=step.length[17:]).prepared(case)
    for a, b in zip(one[:4], together[:4], strict=True):
        assert a is not None and b is not None and torch.equal(a, b[17:])


def test_a_layer_with_a_large_mean() -> None:
    """Its normalization loses no more digits than torch's."""
    case = Case(3, hidden=100, fade=None, coded=False)
    step = make(case)
    step.call.hidden += 300
    assert_same(step.prepared(case), step.in_torch(case))


def test_extremes() -> None:
    """Nothing, and numbers beyond what the step holds."""
    case = Case(2, scored=False)
    step = make(case)
    step.call.k.zero_()
    step.call.v.mul_(1e8)
    assert_same(step.prepared(case), step.in_torch(case))


def test_numbers_between_two_codes() -> None:
    """Their codes show how the quotient by a step is rounded: it is a whole number, but not by the step's inverse."""
    case = Case(4, size=64, value_size=64, scored=False)
    step = make(case)
    level = torch.randint(-127, -64, (4, 1, 1, 64), generator=torch.Generator().manual_seed(0)).float()
    level[..., 0] = 127.5
    size = torch.tensor([7, 13, 15, 255])[:, None, None, None] / 1024
    step.call.v.copy_(spread(level * size))
    assert_same(step.prepared(case), step.in_torch(case))


def test_refused() -> None:
    step = make(Case())
    call, codec, score = step.call, step.codec, step.score_call()
    reads_error = KeyScores(Sizes(1, 1, 16, 16, 48), "learned", 0.3, None, True).to(DEVICE)
    wider = step._replace(scores=reads_error).score_call()
    odd = call.k[..., :12]
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((call.q, call.k, call.v), {"codec": codec._replace(bits=4)}, "codes in 8 bits; got a codec of 4"),
        ((call.q[..., :12], odd, call.v), {}, "powers of 2; got D 12, Dv 16"),
        ((call.q.double(), call.k, call.v), {}, "takes bfloat16, float16 and float32"),
        ((call.q, call.k.clone().requires_grad_(), call.v), {}, "no gradients"),
        ((call.q, call.k, call.v), {"score": wider}, "reads a key and a value, 32 numbers; got 33"),
        ((call.q, call.k, call.v), {"score": score._replace(hidden=call.hidden.double())}, "got float64"),
        ((call.q.expand(1, 1, 2, 16), call.k, call.v), {}, "one token of each text; got 2"),
    ]
    for tensors, options, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare_step(*tensors, **{"codec": codec, "score": score, **options}, length=step.length)  # type: ignore[arg-type]
    halved = score._replace(weights=ScoreWeights(*(x.half() for x in score.weights)))
    reason = prepare_refusal(call.q, call.k, call.v, codec=codec, score=halved)
    assert reason is not None and "weights of the score of float32" in reason
    assert prepare_refusal(call.q, call.k, call.v, codec=codec, score=score) is None


@pytest.mark.slow
def test_kernels_compile(tmp_path: Path) -> None:
    """Triton's compiler takes them for an H100; no GPU is needed to know that."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    command = [sys.executable, str(SCRIPT), "bfloat16", "64"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]
