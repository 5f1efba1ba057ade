"""A split that gives a layer no pairs: what is true of the model is not read from one of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lolcats import LolcatsError
from lolcats.config import FinetuneConfig, LinearizationConfig, TransferConfig
from lolcats.evaluation import student_variants, teacher_variants
from lolcats.modeling import attention_mode, convert, linearized_layers
from lolcats.training import FinetuneStage, TransferStage
from lolcats.training.batches import Batch
from lolcats.variants import CONTROLS
from tiny import perturb

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]
SPLIT = [[[4, 3], [2, 0]], [[9, 0], [3, 0]], [[2, 5], [6, 1]]]
"""The second layer keeps no pairs."""
FAR = pytest.mark.parametrize("far", ["linear", "none"])
STAGE: dict[str, Any] = {"tokens": 480, "batch_size": 2, "warmup_steps": 0}


def batch_of(ids: Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)


@pytest.fixture
def make(teacher: LlamaForCausalLM, tokens: Tokens) -> Students:
    """Make a student of this split, unless told another; the `pairs` of `kept` are the default, 0."""

    def build(far: str, split: Any = SPLIT, move: float = 0.3, **settings: Any) -> Any:
        config = LinearizationConfig(mixer="blend", far=far, sinks=1, split=split, **settings)
        return perturb(convert(copy.deepcopy(teacher), config, input_ids=tokens(2, 40, 4)), move).eval()

    return build


@FAR
@torch.no_grad()
def test_controls_are_those_of_all_layers(make: Students, tokens: Tokens, far: str) -> None:
    student, ids = make(far), tokens(2, 30)
    modes = [layer.mixer.modes for layer in linearized_layers(student)]
    assert len(set(modes)) == 1 and ("near_only" in modes[0]) == (far == "linear")
    found = {*student_variants(student, CONTROLS), *teacher_variants(student)}
    halves = {"near_only", "linear_only"} if far == "linear" else set()
    assert found - {"teacher", "student"} == {"window_only", "no_attention", "training_free", "equal_window"} | halves
    outputs = {}
    for mode in modes[0]:
        with attention_mode(student, mode):
            outputs[mode] = student(ids, use_cache=False).logits
            cache = student(ids[:, :19], use_cache=True).past_key_values
            steps = [student(ids[:, i : i + 1], past_key_values=cache).logits for i in range(19, 30)]
        torch.testing.assert_close(torch.cat(steps, 1), outputs[mode][:, 19:], rtol=1e-3, atol=1e-4)
    for mode in modes[0][1:]:
        assert not torch.allclose(outputs[mode], outputs["full"]), mode
    if far == "linear":
        assert not torch.allclose(outputs["near_only"], outputs["window_only"])


def test_without_pairs_anywhere_there_is_no_near_only(make: Students) -> None:
    student = make("linear", [[4, 0]] * 3, kept={"pairs": 3})
    assert all("near_only" not in layer.mixer.modes for layer in linearized_layers(student))


@FAR
@pytest.mark.parametrize("bits", [16, 8])
def test_both_stages_and_a_copy_on_disk(make: Students, tokens: Tokens, tmp_path: Path, far: str, bits: int) -> None:
    student, ids = make(far, bits=bits, start="matched"), tokens(2, 30)
    for target in ("full",) if far == "none" else ("full", "far", "parts"):
        stage = TransferStage(student, TransferConfig(**STAGE, target=target))
        metrics = stage.backward(batch_of(ids), 1.0)
        assert metrics["layers"].shape == (3,) and bool(metrics["layers"].isfinite().all())
        assert stage.validate(batch_of(ids))["layers"].shape == (3,)
        for number, layer in enumerate(linearized_layers(student)):
            learned = {name.partition(".")[0] for name, p in layer.mixer.named_parameters() if p.grad is not None}
            assert ("score" in learned) == (number != 1) and ("far" in learned) == (far == "linear")
        student.zero_grad()
    tuned = FinetuneStage(student, FinetuneConfig(**STAGE, rank=2, train_feature_maps=True))
    assert all(bool(value.isfinite().all()) for value in tuned.backward(batch_of(ids), 1.0).values())
    tuned.finish()
    student.eval().save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, student(ids).logits)
    words = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **words), student.generate(ids, **words))


def test_tokens_that_see_all_do_so_in_every_head(make: Students) -> None:
    """By their windows: those of the head with the smallest one, and of the layer with the smallest."""
    student = make("none")
    assert [layer.mixer.near_tokens for layer in linearized_layers(student)] == [3, 4, 3]
    assert FinetuneStage(student, FinetuneConfig(**STAGE))._counted.near_tokens == 3


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_only_scores_learn_without_a_far_half(make: Students, tokens: Tokens, bits: int) -> None:
    """So attention transfer makes no outputs, and a layer without pairs learns nothing."""
    student = make("none", move=0.0, bits=bits, start="matched")
    stage = TransferStage(student, TransferConfig(**STAGE))
    stage.backward(batch_of(tokens(2, 30)), 1.0)
    for layer in linearized_layers(student):
        mixer: Any = layer.mixer
        assert not mixer.output_learns and mixer.learns == (mixer.score is not None)
        assert all(p.grad is not None for p in mixer.parameters())


def test_a_window_in_few_bits_has_no_first_stage(make: Students) -> None:
    student = make("none", None, bits=8, start="matched")
    with pytest.raises(LolcatsError, match=r"nothing to train in stage 1: .* nothing to learn by themselves"):
        TransferStage(student, TransferConfig(**STAGE))
