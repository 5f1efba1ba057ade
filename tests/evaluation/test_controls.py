"""Each control is what its name says: compared with models built by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lolcats.config import EvaluationConfig, FinetuneConfig, RunConfig
from lolcats.errors import DataError
from lolcats.evaluation import Variant, measure, student_variants, teacher_variants
from lolcats.evaluation.perplexity import evaluation_segments
from lolcats.modeling import AttentionCall, attention_mode, linearized_layers
from lolcats.training import FinetuneStage
from lolcats.variants import CONTROLS

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")


def window_mask(length: int, window: int, sinks: int, kind: str) -> Tensor:
    """Additive [1, 1, N, N] mask of a causal softmax over window and sinks."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    near = i - j < window if kind == "sliding" else i // window - j // window < 2
    visible = (j <= i) & (near | (j < sinks))
    return torch.zeros(length, length).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


def test_controls_are_the_modes_of_every_mixer(make_student: Students, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student(window=5)
    assert list(student_variants(student, CONTROLS)) == ["student", "window_only", "linear_only", "no_attention"]
    monkeypatch.setattr(linearized_layers(student)[0].mixer, "modes", ("full", "no_attention"), raising=False)
    assert list(student_variants(student, CONTROLS)) == ["student", "no_attention"]
    assert list(teacher_variants(student, controls=CONTROLS)) == ["teacher", "equal_window"]


@pytest.mark.parametrize(("window", "sinks", "kind"), [(5, 0, "sliding"), (5, 3, "sliding"), (4, 2, "terraced")])
def test_window_only_is_softmax_over_window_and_sinks(
    teacher: Any, make_student: Students, tokens: Tokens, window: int, sinks: int, kind: str
) -> None:
    student = make_student(window=window, sinks=sinks, window_kind=kind)
    expected = teacher(tokens(), attention_mask=window_mask(24, window, sinks, kind).expand(2, -1, -1, -1)).logits
    with attention_mode(student, "window_only"):
        torch.testing.assert_close(student(tokens()).logits, expected, atol=2e-4, rtol=0)
    assert float((student(tokens()).logits - expected).abs().max()) > 1e-2


def test_no_attention_is_a_model_whose_attention_gives_nothing(
    teacher: Any, make_student: Students, tokens: Tokens
) -> None:
    student = make_student(window=5)
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    with attention_mode(student, "no_attention"):
        torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sinks", [0, 2])
def test_linear_only_sees_only_keys_outside_the_window(
    make_student: Students, tokens: Tokens, record_calls: Callable[..., Any], sinks: int
) -> None:
    calls: list[tuple[Any, AttentionCall, Tensor]] = record_calls(make_student(window=5, sinks=sinks), tokens())
    i, j = torch.arange(24)[:, None], torch.arange(24)[None]
    far = (i - j >= 5) & (j >= sinks)
    for layer, call, _ in calls:
        weights = (layer.mixer.feature_q(call.q) @ layer.mixer.feature_k(call.k).mT).masked_fill(~far, 0.0)
        total = weights.sum(-1, keepdim=True)
        out = weights @ call.v.repeat_interleave(3, 1) / torch.where(total > 0, total, 1.0)
        torch.testing.assert_close(layer.mixer(call, mode="linear_only")[0], out, atol=1e-5, rtol=0)


def test_controls_leave_softmax_layers_alone(teacher: Any, make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=5, layers=[1])
    teacher.model.layers[1].self_attn.o_proj.weight.zero_()
    with attention_mode(student, "no_attention"):
        torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, atol=1e-5, rtol=0)


def test_student_variants_are_those_asked_for(make_student: Students) -> None:
    student = make_student(window=5)
    assert list(student_variants(student, [])) == ["student"]
    assert list(student_variants(student, ["training_free", "no_attention", "window_only"])) == [
        "student", "window_only", "no_attention",
    ]  # fmt: skip


def test_variants_switch_modes_and_back(teacher: Any, make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=5, sinks=2)
    variants = student_variants(student, ["window_only", "linear_only", "no_attention"]) | teacher_variants(student)
    got = measure(variants, tokens(3, 24), teacher=variants["teacher"])
    assert {layer.mode for layer in linearized_layers(student)} == {"full"}
    alone = measure({"teacher": Variant(teacher), "student": Variant(student)}, tokens(3, 24), teacher=Variant(teacher))
    for name in ("teacher", "student"):
        assert got[name].perplexity == pytest.approx(alone[name].perplexity, rel=1e-4)
        assert got[name].kl == pytest.approx(alone[name].kl, rel=1e-3, abs=1e-6)
    assert got["training_free"] == got["window_only"]  # nothing is trained here
    assert len({score.loss for score in got.values()}) == 6


def test_the_teacher_side_switches_adapters_off(teacher: Any, make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=5)
    plain_control = copy.deepcopy(student)
    stage = FinetuneStage(student, FinetuneConfig(rank=2))
    assert stage.adapter is not None
    for name, p in student.named_parameters():
        if "lora_B" in name:
            p.fill_(0.1)
    variants = teacher_variants(student, stage.adapter.disable_adapter)
    got = measure(variants | student_variants(student, ["window_only"]), tokens(3, 24))
    assert got["teacher"].loss == pytest.approx(measure({"t": Variant(teacher)}, tokens(3, 24))["t"].loss, rel=1e-5)
    untrained = measure(teacher_variants(plain_control), tokens(3, 24))
    assert got["training_free"].loss == pytest.approx(untrained["training_free"].loss, rel=1e-5)
    assert got["window_only"].loss != pytest.approx(got["training_free"].loss, rel=1e-3)


# ---- the text that is measured


def run_config(**evaluation: Any) -> RunConfig:
    return RunConfig(evaluation=EvaluationConfig(**evaluation))


def test_held_out_sequences_are_the_segments(
    packed: Callable[..., Any], tokens: Tokens, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokens(3, 8)
    held = packed(ids.numpy())
    assert torch.equal(evaluation_segments(run_config(), tiny_tokenizer, held), ids)
    assert torch.equal(evaluation_segments(run_config(max_segments=2), tiny_tokenizer, held), ids[:2])
    cut = evaluation_segments(run_config(segment_length=12), tiny_tokenizer, held)
    assert torch.equal(cut, ids.flatten().view(2, 12))


def test_own_text_is_cut_into_segments(
    packed: Callable[..., Any], tokens: Tokens, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Any, text: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    config = run_config(sources=[str(tmp_path / "a.txt")], segment_length=50, max_segments=3)
    got = evaluation_segments(config, tiny_tokenizer, packed(tokens(2, 8).numpy()))
    assert got.flatten().tolist() == tiny_tokenizer(text)["input_ids"][:150]
    with pytest.raises(DataError, match=r"a\.txt: .* lower evaluation\.segment_length"):
        evaluation_segments(config.model_copy(deep=True, update={
            "evaluation": EvaluationConfig(sources=[str(tmp_path / "a.txt")], segment_length=10**6)
        }), tiny_tokenizer, packed(tokens(2, 8).numpy()))  # fmt: skip


def test_last_must_fit_into_a_segment(
    packed: Callable[..., Any], tokens: Tokens, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"evaluation.last=8 must be less than the segment length 8"):
        evaluation_segments(run_config(last=8), tiny_tokenizer, packed(tokens(2, 8).numpy()))


def test_padding_of_held_out_documents_is_not_measured(
    packed: Callable[..., Any], tokens: Tokens, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokens(2, 8).numpy().copy()
    ids[0, 5:] = 77
    held = packed(ids, np.array([[0, 0, 0, 0, 0, -1, -1, -1], [0] * 8]))
    config = RunConfig(data={"sources": ["x"], "packing": "documents"})  # type: ignore[arg-type]
    segments = evaluation_segments(config, tiny_tokenizer, held)
    assert not bool((segments[:, 1:] == 77).any())
