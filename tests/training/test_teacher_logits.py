"""The teacher's likeliest tokens on disk: the loss, and where they are found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lolcats import LolcatsError, finetune_lora
from lolcats.config import FinetuneConfig
from lolcats.data import PackedDataset
from lolcats.files import cache_root
from lolcats.modeling.head import OutputHead
from lolcats.training import FinetuneStage, TrainingData
from lolcats.training.batches import make_batch
from lolcats.training.losses import TeacherStates, next_token_loss
from lolcats.training.teacher_logits import TopK, top_k

VOCABULARY = 97


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teacher_logits"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the ids that the teacher reads."""
    seen: list[tuple[int, ...]] = []
    own = FinetuneStage._states

    def noted(self: FinetuneStage, inputs: dict[str, Any]) -> TeacherStates:
        seen.append(tuple(inputs["input_ids"].shape))
        return own(self, inputs)

    monkeypatch.setattr(FinetuneStage, "_states", noted)
    return seen


def config(k: int = 8, **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "tokens": 320, "batch_size": 4, "lr": 1e-2, "warmup_steps": 0, "kl_factor": 1.0, "cross_entropy_factor": 0.0,
        "rank": 2, "teacher_logits": {"cache": "topk", "k": k}, "validate_every": 2, "checkpoint_every": 2,
    }  # fmt: skip
    return FinetuneConfig.model_validate(settings | changes)


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def train(student: PreTrainedModel, data: TrainingData, settings: FinetuneConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(0)  # of the adapters' start
    finetune_lora(student, data, settings, seed=seed)
    return student


def losses(head: OutputHead, hidden: Tensor, teacher: Any, weights: Tensor | None = None) -> tuple[float, Tensor]:
    hidden = hidden.clone().requires_grad_()
    labels = torch.zeros(hidden.shape[:2], dtype=torch.long)
    loss, _ = next_token_loss(head, hidden, labels, teacher, 0.3, 0.7, all_counted=True, weights=weights)
    loss.backward()
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())
    return float(loss.detach()), hidden.grad


@pytest.fixture
def states(teacher: PreTrainedModel) -> Iterator[tuple[OutputHead, Tensor, TeacherStates]]:
    head, generator = OutputHead(teacher), torch.Generator().manual_seed(0)
    teacher.requires_grad_(False)
    student, own = (2 * torch.randn(2, 5, 36, generator=generator) for _ in range(2))
    yield head, student, TeacherStates(own, head)


@pytest.mark.parametrize("weighted", [False, True])
def test_all_tokens_are_the_whole_divergence(states: Any, weighted: bool) -> None:
    head, student, teacher = states
    weigh = torch.rand(2, 5) if weighted else None
    full, gradient = losses(head, student, teacher, weigh)
    kept, same_gradient = losses(head, student, top_k(teacher, VOCABULARY), weigh)
    assert kept == pytest.approx(full, rel=1e-6)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [1, 5, 40, 96])
def test_the_loss_is_the_divergence_of_the_merged_distributions(states: Any, k: int) -> None:
    head, student, teacher = states
    top = top_k(teacher, k)
    log_t, log_p = (head(x).double().log_softmax(-1) for x in (teacher.hidden, student))
    t, p = log_t.exp(), log_p.exp()
    best = t.topk(k, -1).indices
    assert torch.equal(best, top.tokens) and top.log_t.dtype == torch.float32
    t, p = (torch.cat([x.gather(-1, best), 1 - x.gather(-1, best).sum(-1, keepdim=True)], -1) for x in (t, p))
    expected = (t * (t / p).log()).sum()
    got = top.flat().divergence(log_p.flatten(0, 1).float(), None)
    assert float(got) == pytest.approx(float(expected), rel=1e-4)
    whole = nnf.kl_div(log_p, log_t, reduction="sum", log_target=True)
    assert 0 < float(got) < float(whole) * (1 + 1e-6), "merging tokens can only lose differences"
    losses(head, student, top)


@pytest.mark.slow
def test_a_second_run_of_any_seed_and_batch_size_asks_no_teacher(
    make_student: Callable[..., PreTrainedModel],
    training_data: TrainingData,
    passes: list[tuple[int, ...]],
    cache: Path,
) -> None:
    first = train(make_student(window=4), training_data, config(), 3)
    assert sum(rows for rows, _ in passes) == 10 + 3, "each sequence once, over epochs and validations"
    files = {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    assert len(files) == 2
    passes.clear()
    assert same(weights(train(make_student(window=4), training_data, config(), 3)), weights(first))
    other = train(make_student(window=4), training_data, config(batch_size=2, micro_batch_size=1), 4)
    finetune_lora(make_student(window=3, feature_map="t2r"), training_data, config())
    assert not passes and not same(weights(other), weights(first))
    assert {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()} == files
    finetune_lora(make_student(window=4), training_data, config(k=9))
    assert passes, "another k is another cache"


@pytest.mark.slow
def test_what_is_kept_is_what_is_computed(
    make_student: Callable[..., PreTrainedModel], training_data: TrainingData, passes: list[tuple[int, ...]]
) -> None:
    """A stage whose cache is empty computes row by row, to the same loss."""
    batch = make_batch(training_data.train, np.arange(4), "cpu", True)
    kept, bare = (FinetuneStage(make_student(window=4), config()) for _ in range(2))
    finetune_lora(make_student(window=4), TrainingData(training_data.train, training_data.validation, True), config())
    assert kept.logits is not None
    kept.logits.scan()
    passes.clear()
    with torch.no_grad():
        left = kept.validate(batch)
        assert not passes
        right = bare.validate(batch)
    assert passes == [(4, 20)]
    assert float(left["loss"]) == pytest.approx(float(right["loss"]), rel=1e-6)


@pytest.mark.slow
def test_packing_and_weights_are_part_of_what_is_asked(
    make_student: Callable[..., PreTrainedModel], training_data: TrainingData, passes: list[tuple[int, ...]]
) -> None:
    settings = config(tokens=80)
    finetune_lora(make_student(window=4), training_data, settings)
    train, validation = training_data.train, training_data.validation
    document = train.document.copy()
    document[:, 10:] = 1
    for data in (TrainingData(PackedDataset(train.ids, train.loss_mask, document), validation, True), training_data):
        passes.clear()
        other = make_student(window=4)
        if data is training_data:
            with torch.no_grad():
                other.model.norm.weight.mul_(2)  # type: ignore[union-attr,operator]
        finetune_lora(other, data, settings)
        assert passes


@pytest.mark.slow
def test_made_up_sequences_are_read_by_the_teacher(
    make_student: Callable[..., PreTrainedModel], packed: Callable[..., PackedDataset], passes: list[tuple[int, ...]],
    make_teacher: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, text: str,
) -> None:  # fmt: skip
    ids = np.asarray(tiny_tokenizer(text)["input_ids"])[: 12 * 160].reshape(12, 160)
    data = TrainingData(packed(ids[:8]), packed(ids[8:]), tokenizer=tiny_tokenizer)
    settings = config(tokens=4 * 4 * 160, recall={"share": 0.25, "gap": 160})
    student = make_student(make_teacher(vocab_size=300), window=4)
    finetune_lora(student, data, settings)
    made_up = [shape for shape in passes if shape[0] == 1]
    assert sum(rows for rows, _ in passes) == 12 + 4 and len(made_up) == 4, "one of four rows a step, that row alone"


@pytest.mark.slow
def test_files_that_are_broken(
    make_student: Callable[..., PreTrainedModel],
    training_data: TrainingData,
    passes: list[tuple[int, ...]],
    cache: Path,
) -> None:
    def run() -> list[Tensor]:
        return weights(train(make_student(window=4), training_data, config()))

    expected = run()
    (file,) = cache.rglob("*.safetensors")
    content = file.read_bytes()
    leftover = file.parent / ".x.safetensors.nowhere-1.tmp"
    for broken in (content[:-1], content[:20], b"", None):
        leftover.write_bytes(b"x")
        file.unlink() if broken is None else file.write_bytes(broken)
        passes.clear()
        assert same(run(), expected) and sum(rows for rows, _ in passes) == 13
        assert file.read_bytes() == content
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(
        LolcatsError, match=r"is damaged \(its checksum is another\); delete it, and what was in it is made"
    ):
        run()


@pytest.mark.slow
def test_an_interrupted_pass_goes_on(
    make_student: Callable[..., PreTrainedModel], training_data: TrainingData, passes: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lolcats.training.teacher_logits.SHARD_BYTES", 1)
    own = FinetuneStage.teacher_top

    def stopped(self: FinetuneStage, *args: Any) -> TopK:
        if len(passes) == 2:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(FinetuneStage, "teacher_top", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune_lora(make_student(window=4), training_data, config())
    monkeypatch.setattr(FinetuneStage, "teacher_top", own)
    passes.clear()
    finetune_lora(make_student(window=4), training_data, config())
    assert sum(rows for rows, _ in passes) == 13 - 8


def test_what_cannot_be(
    make_student: Callable[..., PreTrainedModel], training_data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LolcatsError, match=r"finetune.teacher_logits.k 98 is more than the 97 tokens of the model"):
        finetune_lora(make_student(window=4), training_data, config(k=98))
    with pytest.raises(ValueError, match=r"teacher_logits keeps what kl_factor compares with, and kl_factor is 0"):
        config(kl_factor=0.0, cross_entropy_factor=1.0)
    with pytest.raises(ValueError, match=r"the teacher reads in all processes at once.*set recall.share to 0"):
        config(sharding={"enabled": True}, recall={"share": 0.1})
    monkeypatch.setattr("lolcats.files.shutil.disk_usage", lambda place: type("Usage", (), {"free": 100}))
    with pytest.raises(LolcatsError, match=r"teacher_logits.* needs .* and its disk has 100 bytes left"):
        finetune_lora(make_student(window=4), training_data, config())
    monkeypatch.undo()
    cache_root().mkdir(parents=True, exist_ok=True)
    (cache_root() / "teacher_logits").write_text("in the way")
    with pytest.raises(LolcatsError, match=r"cannot write .*set LOLCATS_CACHE=FOLDER"):
        finetune_lora(make_student(window=4), training_data, config())
