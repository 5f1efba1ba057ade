"""Stage 2: losses, what is trained, documents, and merging."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from lolcats import LolcatsError
from lolcats.config import FinetuneConfig
from lolcats.modeling import LinearizedAttention, attention_mode, linearized_layers
from lolcats.training import FinetuneStage, TrainingData, finetune_lora
from lolcats.training.batches import Batch, make_batch

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]


def config(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4 * 3, "batch_size": 4, "warmup_steps": 1, "lr": 1e-2, "rank": 2}
    return FinetuneConfig(**(settings | changes))


def batch_of(ids: Tensor, loss_mask: Tensor | None = None) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool) if loss_mask is None else loss_mask, None, None)


def stir(model: PreTrainedModel) -> None:
    """Give the second LoRA matrices, which start at zero, some weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("maps", [False, True])
def test_gradients_reach_only_what_was_asked_for(make_student: Students, tokens: Tokens, maps: bool) -> None:
    student = make_student(window=4, layers=[0, 2])
    stage = FinetuneStage(student, config(train_feature_maps=maps))
    stir(student)
    stage.backward(batch_of(tokens()), 1.0)
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == set(stage.parameters())
    layers = {"model.layers.0.", "model.layers.2."}
    lora = {
        f"{layer}self_attn.inner.{name}_proj.lora_{side}.default.weight"
        for layer in layers for name in "qkvo" for side in "AB"
    }  # fmt: skip
    added = {
        f"{layer}self_attn.mixer.{name}"
        for layer in layers for name in ("feature_q.weight", "feature_k.weight", "window_factor", "query_scale")
    }  # fmt: skip
    assert with_gradient == (lora | added if maps else lora)
    assert {p.dtype for p in stage.parameters().values()} == {torch.float32}


def test_dropout_drops_in_training_alone(make_student: Students, tokens: Tokens) -> None:
    """Of a model in evaluation, as runs load it; losses of the same weights differ from step to step."""
    for dropout, different in ((0.0, 1), (0.5, 3)):
        student = make_student(window=4).eval()
        stage = FinetuneStage(student, config(dropout=dropout))
        stir(student)
        batch = batch_of(tokens())
        learning = {float(stage.backward(batch, 1.0)["loss"]) for _ in range(3)}
        with torch.no_grad():
            validating = {float(stage.validate(batch)["loss"]) for _ in range(2)}
        assert (len(learning), len(validating)) == (different, 1)
        assert not any(module.training for module in student.modules())


def test_a_bfloat16_model_gets_float32_adapters(make_student: Students, teacher: Any) -> None:
    stage = FinetuneStage(make_student(teacher.to(torch.bfloat16), window=4), config(train_feature_maps=True))
    assert {p.dtype for p in stage.parameters().values()} == {torch.float32}


def test_a_name_outside_attention_is_meant_everywhere(make_student: Students) -> None:
    stage = FinetuneStage(make_student(window=4, layers=[1]), config(targets=["v_proj", "down_proj"]))
    modules = {name.partition(".lora_")[0] for name in stage.parameters()}
    assert modules == {"model.layers.1.self_attn.inner.v_proj", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))}


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_targets_may_be_named_by_their_place(make_student: Students, targets: str) -> None:
    stage = FinetuneStage(make_student(window=4, layers=[1]), config(targets=targets))
    modules = {name.partition(".lora_")[0] for name in stage.parameters()}
    attention = {f"self_attn.inner.{x}_proj" for x in "qkvo"}
    inside = {f"model.layers.1.{name}" for name in attention}
    mlp = {f"model.layers.{i}.mlp.{x}_proj" for i in range(3) for x in ("gate", "up", "down")}
    others = {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 2) for x in "qkvo"}
    assert modules == (inside if targets == "attention" else inside | mlp | others)


def test_unknown_names_are_refused_with_the_known_ones(make_student: Students) -> None:
    with pytest.raises(LolcatsError, match=r"\['nope'\].*'down_proj'.*'q_proj'"):
        FinetuneStage(make_student(window=4), config(targets=["q_proj", "nope"]))


def test_cross_entropy_is_the_models_own_loss(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4)
    stage = FinetuneStage(student, config())
    metrics = stage.validate(batch_of(tokens()))
    with torch.no_grad():
        expected = student(tokens(), labels=tokens()).loss
    torch.testing.assert_close(metrics["loss"], expected)
    torch.testing.assert_close(metrics["cross_entropy"], expected)


def test_distance_is_zero_where_the_student_is_the_teacher(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=20)
    stage = FinetuneStage(student, config(cross_entropy_factor=0.0, kl_factor=1.0))
    assert float(stage.validate(batch_of(tokens(2, 20)))["kl"]) < 1e-6
    stir(student)
    assert float(stage.validate(batch_of(tokens(2, 20)))["kl"]) > 1e-3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_distance_is_from_the_untrained_teacher(
    make_student: Students, teacher: Any, tokens: Tokens, training_data: TrainingData, method: Any
) -> None:
    student, ids = make_student(window=4), tokens()
    stage = FinetuneStage(student, config(cross_entropy_factor=0.5, kl_factor=2.0, method=method))
    with torch.no_grad():
        for p in stage.parameters().values():
            p.add_(0.05)
    got = stage.validate(batch_of(ids))
    with torch.no_grad():
        log_s, log_t = (m(ids).logits[:, :-1].log_softmax(-1) for m in (student, teacher))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    ce = nnf.cross_entropy(log_s.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(got["kl"], kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got["loss"], 0.5 * ce + 2 * kl, rtol=1e-3, atol=1e-5)
    assert {layer.mode for layer in linearized_layers(student)} == {"full"}


def test_gradient_is_that_of_the_plain_loss(make_student: Students, teacher: Any, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens()
    stage = FinetuneStage(student, config(cross_entropy_factor=0.5, kl_factor=2.0))
    stir(student)
    stage.backward(batch_of(ids), 0.5)
    got = {name: p.grad for name, p in stage.parameters().items()}
    for p in student.parameters():
        p.grad = None
    log_s = student(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_t = teacher(ids).logits[:, :-1].log_softmax(-1)
    ce = nnf.nll_loss(log_s.flatten(0, 1), ids[:, 1:].flatten())
    (0.5 * (0.5 * ce + 2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean())).backward()
    for name, p in stage.parameters().items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-5)


def test_prompts_can_be_left_out(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens(2, 20)
    mask = torch.arange(20)[None] >= torch.tensor([[6], [15]])
    with torch.no_grad():
        log_p = student(ids).logits[:, :-1].log_softmax(-1)
    loss = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    counted = loss[mask[:, 1:]].mean()
    stage = FinetuneStage(student, config(mask_prompt=True))
    torch.testing.assert_close(stage.validate(batch_of(ids, mask))["loss"], counted)
    everything = FinetuneStage(make_student(window=4), config()).validate(batch_of(ids, mask))["loss"]
    torch.testing.assert_close(everything, loss.mean())


@pytest.mark.parametrize("layers", ["all", [0, 2]])
def test_documents_and_padding(make_student: Students, packed: Callable[..., Any], tokens: Tokens, layers: Any) -> None:
    student, ids = make_student(window=4, sinks=2, layers=layers), tokens(1, 20)
    data = packed(ids.numpy(), np.array([[0] * 7 + [1] * 9 + [-1] * 4]))
    stage = FinetuneStage(student, config(kl_factor=1.0))
    together = stage.validate(make_batch(data, np.arange(1), "cpu", keep_apart=True))
    alone = [stage.validate(batch_of(part)) for part in ids[:, :16].split([7, 9], 1)]
    for name in ("cross_entropy", "kl", "loss"):
        torch.testing.assert_close(together[name], (6 * alone[0][name] + 8 * alone[1][name]) / 14, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], ["o_proj", "up_proj"]], ids=str)
def test_merged_is_unmerged(
    make_student: Students, training_data: TrainingData, tokens: Tokens, targets: list[str]
) -> None:
    names = {name for name, _ in make_student(window=4).named_parameters()}
    logits = []
    for merge in (False, True):
        torch.manual_seed(0)
        student = make_student(window=4)
        _, adapter = finetune_lora(student, training_data, config(merge=merge, targets=targets))
        assert isinstance(adapter, PeftModel) is not merge
        with torch.no_grad():
            logits.append((adapter or student)(input_ids=tokens()).logits)
        if merge:
            assert {name for name, _ in student.named_parameters()} == names
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
    with torch.no_grad():
        assert float((logits[0] - make_student(window=4)(tokens()).logits).abs().max()) > 1e-3


@pytest.mark.slow
def test_training_learns_and_leaves_the_rest_alone(make_student: Students, training_data: TrainingData) -> None:
    torch.manual_seed(0)
    student = make_student(window=4)
    before = copy.deepcopy(student.state_dict())
    ids = torch.from_numpy(training_data.train.ids).long()
    with torch.no_grad():
        start = float(student(ids, labels=ids).loss)
    data = TrainingData(training_data.train, training_data.train)
    result, _ = finetune_lora(student, data, config(tokens=20 * 4 * 25, validate_every=5))
    assert result.best_loss < start - 0.1
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.slow
def test_feature_maps_train_too_when_asked(make_student: Students, training_data: TrainingData) -> None:
    student = make_student(window=4)
    before = copy.deepcopy(student)
    finetune_lora(student, training_data, config(train_feature_maps=True))
    for layer, old in zip(linearized_layers(student), linearized_layers(before), strict=True):
        assert not torch.equal(layer.mixer.feature_q.weight, old.mixer.feature_q.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("kl_factor", [0.0, 1.0])
def test_full_finetuning_trains_every_weight(
    make_student: Students, training_data: TrainingData, kl_factor: float
) -> None:
    student = make_student(window=4)
    before = copy.deepcopy(student.state_dict())
    _, adapter = finetune_lora(student, training_data, config(method="full", kl_factor=kl_factor, lr=1e-3))
    assert adapter is None
    for name, value in student.state_dict().items():
        added = any(part in name for part in ("feature_", "window_factor", "query_scale"))
        assert torch.equal(value, before[name]) is added, name


def test_full_finetuning_with_tied_embeddings(
    make_teacher: Callable[..., LlamaForCausalLM], make_student: Students, training_data: TrainingData, tokens: Tokens
) -> None:
    student: Any = make_student(make_teacher(tie_word_embeddings=True), window=4)
    finetune_lora(student, training_data, config(method="full", lr=1e-3))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with torch.no_grad():
        assert bool(student(tokens()).logits.isfinite().all())


def test_a_loss_that_is_not_finite_names_the_parameter(make_student: Students, training_data: TrainingData) -> None:
    student: Any = make_student(window=4)
    stage = FinetuneStage(student, config())
    poison(student)
    metrics = stage.backward(make_batch(training_data.train, np.arange(2), "cpu", False), 1.0)
    assert not metrics["loss"].isfinite() and re.match(r", first in model\.layers\.\d", stage.where(metrics))
    with pytest.raises(LolcatsError, match="logits that are not finite"):
        finetune_lora(poison(make_student(window=4)), training_data, config())


def poison(student: Any) -> Any:
    """One weight of a feature map that is not a number."""
    with torch.no_grad():
        student.get_submodule("model.layers.1.self_attn.mixer.feature_k").weight[0, 0, 0] = torch.nan
    return student


def test_the_teacher_is_the_same_weights_without_adapters(make_student: Students, teacher: Any, tokens: Tokens) -> None:
    student = make_student(window=4)
    stage = FinetuneStage(student, config(kl_factor=1.0))
    stir(student)
    assert stage.teacher is None and stage.adapter is not None
    with torch.no_grad(), attention_mode(student, "softmax"), stage.adapter.disable_adapter():
        torch.testing.assert_close(student(tokens()).logits, teacher(tokens()).logits, atol=1e-4, rtol=0)
    assert sum(isinstance(m, LinearizedAttention) for m in student.modules()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "prompts", "documents"])
def test_micro_batches_give_the_same_gradient(
    make_student: Students, packed: Callable[..., Any], tokens: Tokens, kind: str
) -> None:
    ids, generator = tokens(4, 20).numpy(), np.random.default_rng(0)
    mask = np.arange(20)[None] >= np.array([[2], [5], [12], [18]])
    document = np.where(np.arange(20)[None] < np.array([[20], [15], [9], [4]]), 0, -1)
    data = {
        "stream": packed(ids),
        "prompts": packed(ids, loss_mask=mask),
        "documents": packed(ids, document),
    }[kind]
    data = data[generator.permutation(4)]
    trained = []
    for size in (4, 1):
        torch.manual_seed(0)
        student = make_student(window=4)
        settings = config(tokens=80, micro_batch_size=size, mask_prompt=kind == "prompts", warmup_steps=0)
        result, _ = finetune_lora(student, TrainingData(data, data, kind == "documents"), settings)
        trained.append((student, result.best_loss))
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-4)
    for p, q in zip(trained[0][0].parameters(), trained[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
