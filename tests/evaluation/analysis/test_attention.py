"""Maps of attention weights: those of the layer, pooled without a loss of weight, in the bytes that were allowed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from inside_cases import LAYERS, near_weights, passes, teacher_weights
from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis import layers
from lolcats.evaluation.analysis.attention import Pooling, attention_maps, choose_maps, read_map, text_in_cells
from lolcats.evaluation.analysis.file import HeadAnalysis, LayerAnalysis
from lolcats.evaluation.analysis.maps import map_bytes
from lolcats.evaluation.analysis.stream import LayerPass, Stream

pytestmark = pytest.mark.usefixtures("no_gradients")
TOKENS = 23
Make = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def awkward_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of these tests are in several blocks, the last of which is not full."""
    monkeypatch.setattr(layers, "BLOCK", 5)


def slowly_pooled(weights: Tensor, cell: int) -> Tensor:
    """Weights [H, N, N] in cells, one after the other."""
    parts = [range(begin, min(begin + cell, TOKENS)) for begin in range(0, TOKENS, cell)]
    pooled = torch.zeros(len(weights), len(parts), len(parts), dtype=torch.float64)
    for a, queries in enumerate(parts):
        for b, keys in enumerate(parts):
            pooled[:, a, b] = sum(weights[:, i, j] for i in queries for j in keys) / len(queries)  # type: ignore[assignment]
    return pooled


def slow_student(seen: LayerPass) -> Tensor:
    """[H, N, N]: near weights straight from the definition; the far half's by what it gives for single keys."""
    inside, n = seen.inside(), seen.call.q.shape[2]
    identity = torch.eye(n).expand(1, len(inside.sizes), n, n)
    if seen.student.mixer.settings.window and inside.window_factor is not None:  # one denominator for both halves
        return inside.near(identity)[0].double()
    near = near_weights(seen)[0]
    if inside.far is None or inside.share is None:
        return near
    return (1 - inside.share[0, ..., None].double()) * near + inside.far(identity)[0].double()


@pytest.mark.parametrize("cells", [100, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_maps(name: str, cells: int, make_student: Make, tokens: Tokens) -> None:
    seen = passes(make_student(**LAYERS[name]), tokens(1, TOKENS)[0])[1]
    pooling = Pooling.of(TOKENS, cells)
    assert pooling.cells <= cells and (pooling.cells - 1) * pooling.cell < TOKENS <= pooling.cells * pooling.cell
    teacher, student = attention_maps(seen, pooling)
    torch.testing.assert_close(
        teacher.double(), slowly_pooled(teacher_weights(seen.teacher), pooling.cell), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(student.double(), slowly_pooled(slow_student(seen), pooling.cell), rtol=1e-4, atol=1e-5)
    assert not teacher.triu(1).any() and not student.triu(1).any()
    ones = torch.ones(teacher.shape[:2])
    torch.testing.assert_close(teacher.sum(-1), ones)
    if name != "random":  # its recurrence is no mean of values
        torch.testing.assert_close(student.sum(-1), ones)


def test_weights_times_values_are_the_output(make_student: Make, tokens: Tokens) -> None:
    for name, settings in LAYERS.items():
        seen = passes(make_student(**settings), tokens(1, TOKENS)[0])[2]
        teacher, student = attention_maps(seen, Pooling.of(TOKENS, TOKENS))
        for weights, call, output in (
            (teacher, seen.teacher, seen.output),
            (student, seen.call, seen.student_output()),
        ):
            values = call.v[0].repeat_interleave(3, 0)
            torch.testing.assert_close(weights @ values, output[0], rtol=1e-4, atol=1e-4, msg=name)


def fake_layers(errors: list[float], heads: int = 4) -> list[LayerAnalysis]:
    rows = [HeadAnalysis(head=head, key_head=head) for head in range(heads)]
    found = [LayerAnalysis(layer=n, linearized=True, relative_error=e, heads=rows) for n, e in enumerate(errors)]
    return [*found, LayerAnalysis(layer=len(errors), linearized=False)]


def test_the_bytes_choose_layers_and_heads() -> None:
    """The worst, the best, the next worst, and so on; all heads of a layer where there is room."""
    layers, one = fake_layers([0.3, 0.1, 0.9, 0.2, 0.5]), map_bytes(8)
    assert choose_maps(layers, [8], 4 * one) == ([2], [0, 1, 2, 3])
    assert choose_maps(layers, [8], 8 * one) == ([1, 2], [0, 1, 2, 3])
    assert choose_maps(layers, [8], 12 * one + 1) == ([1, 2, 4], [0, 1, 2, 3])
    assert choose_maps(layers, [8], 10**9) == ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    assert choose_maps(layers, [8, 8], 12 * one) == ([2], [0, 1, 2, 3])  # two texts
    assert choose_maps(layers, [8], 2 * one) == ([2], [0, 2])
    with pytest.raises(LolcatsError, match="expected room for a map"):
        choose_maps(layers, [8], one - 1)


def test_maps_of_a_text(make_student: Make, tokens: Tokens, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    student, ids, pooling = make_student(**LAYERS["learned"]), tokens(1, TOKENS)[0], Pooling.of(TOKENS, 9)
    maps = read_map(Stream(student, student, [0, 2]), ids, pooling, [5, 1])
    assert maps.teacher.shape == maps.student.shape == (2, 2, 8, 8)
    expected = attention_maps(passes(student, ids)[2], pooling)
    for part, own in zip(maps, expected, strict=True):
        assert np.array_equal(part[1], own[[5, 1]].numpy())
    text = text_in_cells(
        tiny_tokenizer, "a", torch.tensor(tiny_tokenizer("the river runs")["input_ids"]), Pooling.of(9, 4)
    )
    assert "".join(text.tokens) == "the river runs" and text.cell == 3
