"""Sequences with questions in both stages, and the gap that doubles: the same for the same seed, step and place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from killing import Killed, Killer
from lolcats import LolcatsError, linearize
from lolcats.config import FinetuneConfig, RunConfig, TransferConfig
from lolcats.data import PackedDataset
from lolcats.modeling.head import OutputHead
from lolcats.training import FinetuneStage, Reporter, TrainingData, TrainResult, finetune_lora, transfer_attention
from lolcats.training.batches import Batch
from lolcats.training.checkpoint import read_metadata
from lolcats.training.reading import Reader
from lolcats.training.recall import MEASURED, Recall, count_right
from lolcats.training.resume import Progress

Students = Callable[..., Any]
LENGTH = 160


def packed(rows: int, seed: int) -> PackedDataset:
    """Sequences of random tokens of the tiny tokenizer; of each the last ten are padding."""
    ids = np.random.default_rng(seed).integers(3, 300, (rows, LENGTH)).astype(np.int32)
    document = np.zeros(ids.shape, np.int32)
    document[:, -10:] = -1
    return PackedDataset(ids, document == 0, document)


@pytest.fixture
def data(tiny_tokenizer: PreTrainedTokenizerFast) -> TrainingData:
    """Ten sequences to train on, three to validate on."""
    return TrainingData(packed(10, 7), packed(3, 8), True, tiny_tokenizer)


def config(kind: Any = FinetuneConfig, **changes: Any) -> Any:
    settings: dict[str, Any] = {"tokens": LENGTH * 4 * 9, "batch_size": 4, "warmup_steps": 1, "lr": 1e-3}
    settings |= {"recall": {"share": 0.3, "gap": 16}, "validate_every": 2, "checkpoint_every": 3, "compile": False}
    return kind(**(settings | ({"rank": 2} if kind is FinetuneConfig else {}) | changes))


def recall_for(data: TrainingData, share: float = 0.3, seed: int = 0, grows: bool = True) -> Recall:
    return Recall(share, 16, grows, data, seed)


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_the_share_is_met_over_the_steps(data: TrainingData, share: float) -> None:
    recall = recall_for(data, share)
    counts = np.array([recall.places(step, 4).sum() for step in range(40)])
    assert counts.sum() == round(160 * share) and counts.max() - counts.min() <= 1
    assert len({recall.places(step, 4).tobytes() for step in range(40)}) > 1 or share in (0.0, 1.0)


def test_what_is_read_depends_on_seed_step_and_place_alone(data: TrainingData) -> None:
    """However many processes there are."""
    one = Reader(config(), data, seed=5).read(3, 16).data
    halves = [Reader(config(), data, 5, process, 2).read(3, 16).data for process in (0, 1)]
    for mine, number in ((halves[0], slice(0, None, 2)), (halves[1], slice(1, None, 2))):
        for name in ("ids", "loss_mask", "document"):
            assert np.array_equal(getattr(mine, name), getattr(one, name)[number])
    assert not np.array_equal(Reader(config(), data, seed=6).read(3, 16).data.ids, one.ids)
    assert not np.array_equal(Reader(config(), data, seed=5).read(4, 16).data.ids, one.ids)


def test_the_others_stay_as_they_are(data: TrainingData) -> None:
    reader = Reader(config(recall={"share": 0.25}), data, seed=0)
    plain = Reader(config(recall={"share": 0.0}), data, seed=0).read(0, None)
    part = reader.read(0, 16).data
    assert reader.recall is not None
    places = reader.recall.places(0, 4)
    assert places.sum() == 1
    for place in range(4):
        before = plain.data[plain.rows[[place]]]
        assert np.array_equal(part.ids[place], before.ids[0]) is not bool(places[place])
    new = int(np.flatnonzero(places)[0])
    assert (part.document[new] == 0).all() and 0 < part.loss_mask[new].sum() < LENGTH / 4
    own = set(data.train.ids[plain.rows[new], :-10].tolist())
    assert len(set(part.ids[new].tolist()) & own) > 20  # its text goes on
    assert (data.train.document[:, -10:] == -1).all()  # the data themselves are not written to


def test_training_and_measuring_ask_different_questions(data: TrainingData) -> None:
    recall = recall_for(data, 1.0)
    (trained,) = recall.replace(np.arange(1), slice(0, 1), 2, 16).ids
    first, second = (recall.questions(step, 16, torch.device("cpu"), 3) for step in (2, 4))
    assert [len(batch.input_ids) for batch in first] == [3, 3, 2] and sum(len(b.input_ids) for b in first) == MEASURED
    rows = {row.numpy().tobytes() for part in (first, second) for b in part for row in b.input_ids}
    assert len(rows) == 2 * MEASURED and trained.astype(np.int64).tobytes() not in rows


def test_the_gap_doubles_where_the_answers_are_right(data: TrainingData) -> None:
    recall, progress = recall_for(data), Progress(gap=16)
    gaps = []
    for accuracy in (0.89, 0.9, 1.0, 0.5, 1.0, 1.0, 1.0):
        recall.judge(progress, {"recall_accuracy": accuracy})
        gaps.append(progress.gap)
    assert gaps == [16, 32, 64, 64, 128, LENGTH, LENGTH] and progress.accuracy == 1.0
    fixed = Progress(gap=16)
    recall_for(data, grows=False).judge(fixed, {})
    assert fixed.gap == 16


def test_an_answer_is_right_if_all_its_tokens_are(make_teacher: Students) -> None:
    model = make_teacher(vocab_size=300)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for place in (3, 4, 6, 7, 8, 11):  # what follows is what the model says
            ids[:, place] = model(ids[:, :place]).logits[:, -1].argmax(-1)
    answers = torch.zeros_like(ids)
    answers[0, 3:5], answers[0, 6:9], answers[1, 3:6], answers[1, 11] = 1, 2, 1, 2  # the token at 5 is at random
    found = count_right(OutputHead(model), Batch(ids, answers > 0, None, None, answers=answers))
    assert {name: int(count) for name, count in found.items()} == {"right": 3, "asked": 4}


def test_refusals_say_what_to_do(data: TrainingData) -> None:
    with pytest.raises(LolcatsError, match=r"TrainingData\(\.\.\., tokenizer=\.\.\.\)"):
        Reader(config(), TrainingData(data.train, data.validation), seed=0)
    short = PackedDataset(data.train.ids[:, :30], data.train.loss_mask[:, :30], data.train.document[:, :30])
    with pytest.raises(LolcatsError, match=r"sequences of 30 tokens have no room"):
        Reader(config(), TrainingData(short, short, tokenizer=data.tokenizer), seed=0)


def test_the_first_stage_asks_at_all_distances(data: TrainingData) -> None:
    reader = Reader(config(TransferConfig, recall={"share": 0.5}), data, seed=0)
    assert reader.recall is not None and reader.recall.first_gap == LENGTH and not reader.recall.grows
    near = Reader(config(TransferConfig, recall={"share": 0.5, "gap": 8}), data, seed=0)
    assert near.recall is not None and near.recall.first_gap == 8


@pytest.mark.parametrize("kind", [TransferConfig, FinetuneConfig])
def test_a_gap_longer_than_the_sequences_is_their_length(data: TrainingData, kind: Any) -> None:
    far, whole = (Reader(config(kind, recall={"share": 0.5, "gap": gap}), data, seed=0) for gap in (2048, LENGTH))
    assert far.recall is not None and far.recall.first_gap == LENGTH
    assert np.array_equal(far.read(0, None).data.ids, whole.read(0, None).data.ids)


# ---- whole stages


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def run(student: Any, data: TrainingData, folder: Path, reporter: Reporter | None = None) -> TrainResult:
    torch.manual_seed(0)
    return finetune_lora(student, data, config(), folder=folder, reporter=reporter)[0]


@pytest.fixture
def student(make_student: Students, make_teacher: Students) -> Any:
    """One that knows the tokens of the tiny tokenizer."""
    return make_student(make_teacher(vocab_size=300), window=8)


@pytest.mark.slow
def test_resumed_is_undisturbed(
    student: Any, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gap that doubles at each validation, and checkpoints between them."""
    right = {"right": torch.tensor(9), "asked": torch.tensor(10)}
    monkeypatch.setattr("lolcats.training.finetune.count_right", lambda head, batch: right)
    metrics, other = tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"
    whole, last = copy.deepcopy(student), tmp_path / "run" / "last.safetensors"
    expected = run(whole, data, tmp_path / "other", Reporter(other))
    for at, gap in ((4, 32), (7, 128)):
        with pytest.raises(Killed):
            run(copy.deepcopy(student), data, tmp_path / "run", Killer(metrics, at))
        assert (read_metadata(last)["gap"], read_metadata(last)["accuracy"]) == (gap, 0.9)
    result = run(student, data, tmp_path / "run", Reporter(metrics))
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), whole.parameters(), strict=True))
    assert (result.final, result.best_step) == (expected.final, expected.best_step)
    assert lines_of(metrics) == lines_of(other)
    gaps = [line["recall_gap"] for line in lines_of(other) if "recall_gap" in line]
    assert gaps == [16, 16, 32, 32, 64, 64, 128, 128, LENGTH]
    told = [(line["validation_recall_accuracy"], line["validation_recall_gap"]) for line in lines_of(other)
            if "validation_loss" in line]  # fmt: skip
    assert told == [(0.9, gap) for gap in (16, 32, 64, 128, LENGTH)]


@pytest.mark.slow
def test_the_model_itself_is_asked(student: Any, data: TrainingData, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    run(student, data, tmp_path / "run", Reporter(metrics))
    accuracy = [x["validation_recall_accuracy"] for x in lines_of(metrics) if "validation_loss" in x]
    assert len(accuracy) == 5 and all(0 <= x < 0.9 for x in accuracy)  # a random model knows nothing
    assert {x["recall_gap"] for x in lines_of(metrics) if "recall_gap" in x} == {16}


@pytest.mark.slow
def test_a_stage_without_questions_is_as_before(student: Any, data: TrainingData, tmp_path: Path) -> None:
    """A tokenizer and defaults change nothing, and the checkpoint says nothing of a gap."""
    results = []
    for number, sets in enumerate((data, TrainingData(data.train, data.validation, True))):
        torch.manual_seed(0)
        changes = config(recall={"share": 0.0})
        results.append(finetune_lora(copy.deepcopy(student), sets, changes, folder=tmp_path / f"{number}")[0].final)
        assert "gap" not in read_metadata(tmp_path / f"{number}" / "last.safetensors")
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_learned_score_learns_from_questions(
    make_student: Students, make_teacher: Students, data: TrainingData
) -> None:
    torch.manual_seed(0)
    student = make_student(make_teacher(vocab_size=300), mixer="blend", window=8, kept={"pairs": 4}, far="none")
    plain = copy.deepcopy(student)
    sets = TrainingData(data.train, data.validation, False, data.tokenizer)
    settings = config(TransferConfig, recall={"share": 0.5})
    transfer_attention(student, sets, settings)
    transfer_attention(plain, sets, config(TransferConfig, recall={"share": 0.0}))
    assert any(not torch.equal(p, q) for p, q in zip(student.parameters(), plain.parameters(), strict=True))


@pytest.mark.slow
def test_a_run_asks_in_both_stages(make_config: Callable[..., RunConfig]) -> None:
    settings = ["data.sequence_length=160", "data.validation_sequences=2", "transfer.tokens=1280",
                "finetune.tokens=1280", "transfer.recall.share=0.5", "finetune.recall.share=0.5",
                "finetune.recall.gap=5", "transfer.batch_size=2", "finetune.batch_size=2"]  # fmt: skip
    folder = linearize(make_config(*settings))
    lines = lines_of(folder.metrics_file)
    gaps = {stage: {x["recall_gap"] for x in lines if x["stage"] == stage and "lr" in x}
            for stage in ("transfer", "finetune")}  # fmt: skip
    assert gaps == {"transfer": {160}, "finetune": {5}}
    asked = {x["stage"] for x in lines if "validation_recall_accuracy" in x}
    assert asked == {"finetune"} and folder.results().complete


def test_answers_are_validated_apart(student: Any, data: TrainingData) -> None:
    stage = FinetuneStage(student, config())
    (batch,) = recall_for(data).questions(0, 16, torch.device("cpu"), MEASURED)
    found = stage.validate(batch)
    assert found.keys() == {"right", "asked"} and batch.answers is not None
    assert int(found["asked"]) == sum(int(row.max()) for row in batch.answers) >= MEASURED
