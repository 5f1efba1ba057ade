"""Errors, entropy and shares of layers and heads, against loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import FAMILIES
from inside_cases import LAYERS, near_weights, passes, seen_keys, teacher_weights
from lolcats.config import LinearizationConfig, TransferConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis import layers
from lolcats.evaluation.analysis.file import LayerAnalysis
from lolcats.evaluation.analysis.layers import LayerMeter, transfer_errors
from lolcats.evaluation.analysis.stream import LayerPass, Stream
from lolcats.modeling import convert, linearized_layers
from lolcats.training import TransferStage
from lolcats.training.batches import Batch

pytestmark = pytest.mark.usefixtures("no_gradients")
TOKENS = 23
Make = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def awkward_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of these tests are in several blocks, the last of which is not full."""
    monkeypatch.setattr(layers, "BLOCK", 5)


def measured(*texts: LayerPass) -> LayerAnalysis:
    """What a meter says of one layer."""
    meter = LayerMeter()
    for seen in texts:
        meter.add(seen)
    return meter.found(texts[0].layer)


def mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def slow_head(seen: LayerPass, head: int, pairs: Tensor | None) -> dict[str, Any]:
    """One head by loops over queries; `pairs` [H, N] is the weight that near attention gives to kept pairs."""
    inside, n = seen.inside(), seen.call.q.shape[2]
    error = (seen.student_output() - seen.output)[0, head].double().square().mean()
    teacher, square = teacher_weights(seen.teacher)[head], seen.output[0, head].double().square().mean()
    total = inside.total(torch.eye(n).expand(1, len(inside.sizes), n, n))[0, head]
    far: dict[str, list[float]] = {"teacher": [], "kept": [], "share": []}
    for i, (near, _) in enumerate(seen_keys(seen, head)):
        beyond = [j for j in range(i + 1) if j not in near]
        if not beyond:
            continue
        share = None if inside.share is None else float(inside.share[0, head, i])
        far["teacher"].append(float(teacher[i, beyond].sum()))
        if inside.sizes[head // 3].pairs:
            assert pairs is not None
            far["kept"].append((1 - (share or 0.0)) * float(pairs[head, i]))
        if share is not None or inside.one_denominator:
            far["share"].append(float(total[i, beyond].sum()) if share is None else share)
    return {
        "error": float(error), "relative_error": float(error / square), "far_share_teacher": mean(far["teacher"]),
        "entropy": float(-(teacher * teacher.clamp_min(1e-300).log()).sum(-1).mean()), "kept_share": mean(far["kept"]),
        "share": mean(far["share"]), "far_share_student": (mean(far["kept"]) or 0.0) + (mean(far["share"]) or 0.0),
    }  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_heads(name: str, make_student: Make, tokens: Tokens) -> None:
    every = list(passes(make_student(**LAYERS[name]), tokens(1, TOKENS)[0]).values())
    for seen in every if name == "heads" else every[1:2]:  # where layers differ, all of them
        found, pairs = measured(seen), None if seen.inside().keep is None else near_weights(seen)[1].sum(-1)
        for head in found.heads:
            for key, value in slow_head(seen, head.head, pairs).items():
                expected = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
                assert getattr(head, key) == expected, (key, head)
            assert head.key_head == head.head // 3
            assert (head.window, head.sinks, head.pairs) == seen.inside().sizes[head.key_head]
        assert found.error == pytest.approx(mean([head.error or 0.0 for head in found.heads]))
        assert found.entropy == pytest.approx(mean([head.entropy or 0.0 for head in found.heads]))


def test_sizes_that_differ_by_head(make_student: Make, tokens: Tokens) -> None:
    """Those of the settings, in the order of the key heads."""
    seen = passes(make_student(**LAYERS["heads"]), tokens(1, TOKENS)[0])
    sizes = {layer: [(h.window, h.pairs) for h in measured(one).heads[::3]] for layer, one in seen.items()}
    assert sizes == {0: [(4, 3), (2, 0)], 1: [(1, 6), (7, 2)], 2: [(3, 2), (3, 2)]}


def test_texts_are_added_up(make_student: Make, tokens: Tokens) -> None:
    """Two texts of one length are the mean of both."""
    student = make_student(**LAYERS["learned"])
    one, two = (passes(student, ids)[1] for ids in tokens(2, TOKENS))
    both, alone = measured(one, two), [measured(one), measured(two)]
    for key in ("error", "entropy"):
        assert getattr(both, key) == pytest.approx(mean([getattr(found, key) for found in alone]))
    for key in ("kept_share", "share", "decay", "far_share_teacher"):
        values = [getattr(found.heads[4], key) for found in alone]
        assert getattr(both.heads[4], key) == pytest.approx(mean(values)) and values[0] != values[1]


def test_the_error_is_that_of_stage_1(make_student: Make, tokens: Tokens) -> None:
    """One definition, one number."""
    student, ids = make_student(**LAYERS["hybrid"]), tokens(2, TOKENS)
    stage = TransferStage(student, TransferConfig(tokens=48, compile=False))
    expected = stage.validate(Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None))["layers"]
    errors = transfer_errors(student, ids)
    torch.testing.assert_close(torch.tensor(list(errors.values())), expected, check_dtype=False)
    for layer in errors:
        assert measured(*(passes(student, text)[layer] for text in ids)).error == pytest.approx(errors[layer])


def test_short_texts_have_no_far_share(make_student: Make, tokens: Tokens) -> None:
    found = measured(passes(make_student(**LAYERS["no pairs"]), tokens(1, 6)[0])[0])
    assert all(head.far_share_teacher is None and head.share is None for head in found.heads)
    assert found.error is not None and found.entropy is not None


def test_a_student_with_other_projections(make_student: Make, tokens: Tokens) -> None:
    """Its layers see what the teacher's see, each by its own weights; errors of earlier layers are not in them."""
    teacher = make_student(**LAYERS["learned"])
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in linearized_layers(student):
            layer.inner.q_proj.weight.mul_(2)  # type: ignore[union-attr, operator]
    seen = passes(teacher, tokens(1, TOKENS)[0], student)
    plain = passes(teacher, tokens(1, TOKENS)[0])
    for layer, one in seen.items():
        assert torch.equal(one.output, plain[layer].output) and torch.equal(one.teacher.q, plain[layer].teacher.q)
        torch.testing.assert_close(one.call.q, 2 * plain[layer].call.q)
        torch.testing.assert_close(one.call.k, plain[layer].call.k)
        assert one.student in linearized_layers(student)
        assert measured(one).entropy == measured(plain[layer]).entropy
        assert measured(one).error != measured(plain[layer]).error


def family_model(family: str, layers: str) -> PreTrainedModel:
    """A tiny one, linearized where it can be."""
    base = {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.3,
            "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    own = {name: value for name, value in (base | FAMILIES[family].settings).items() if value is not None}
    config = AutoConfig.for_model(family, **own)
    return convert(AutoModelForCausalLM.from_config(config).eval(), LinearizationConfig(**LAYERS[layers]), seed=0)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("gemma2", "learned"), ("gpt_oss", "learned"), ("gpt2", "hybrid"), ("deepseek_v3", "learned")],
)
def test_families(family: str, layers: str, tokens: Tokens) -> None:
    """Local layers stay as they are; caps, learned sinks and other ways to make q, k and v are those of the family."""
    model, ids = family_model(family, layers), tokens(1, TOKENS)[0]
    seen, apart = passes(model, ids), passes(model, ids, copy.deepcopy(model))
    assert tuple(seen) == FAMILIES[family].layers
    for layer, one in seen.items():
        weights = teacher_weights(one.teacher)
        values = one.teacher.v[0].double().repeat_interleave(len(weights) // one.teacher.v.shape[1], 0)
        torch.testing.assert_close(weights @ values, one.output[0].double(), rtol=1e-4, atol=1e-5)
        entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1).mean()
        assert measured(one).entropy == pytest.approx(float(entropy), rel=1e-4)
        assert measured(one) == measured(apart[layer])  # whose own modules are called with the same inputs


def test_what_cannot_be_looked_at(make_student: Make, teacher: PreTrainedModel) -> None:
    student = make_student(window=4)
    with pytest.raises(LolcatsError, match=r"layers \[7\] are not linearized; choose some of \[0, 1, 2\]"):
        Stream(student, student, [1, 7])
    with pytest.raises(LolcatsError, match="converted as the student is"):
        Stream(make_student(window=4, layers=[1]), student)
    with pytest.raises(LolcatsError, match="no layer to look at"):
        Stream(teacher, teacher)
