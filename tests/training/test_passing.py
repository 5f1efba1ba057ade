"""State passing: parts of a long text give its whole loss, gradients end at each part, and a kill changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import DynamicCache

from killing import Killed, Killer
from lolcats import LolcatsError, linearize
from lolcats.config import FinetuneConfig, RunConfig
from lolcats.data import PackedDataset
from lolcats.mixers import map_state
from lolcats.modeling import linearized_layers
from lolcats.modeling.attention import attention_mode
from lolcats.modeling.cache import LinearizedLayer
from lolcats.training import FinetuneStage, Reporter, TrainingData, TrainResult, finetune_lora
from lolcats.training.batches import Batch, step_rows
from lolcats.training.graphs import GraphedStage
from lolcats.training.passing import passing_of
from lolcats.training.reading import Reader, check_reading

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]
LAYERS: list[dict[str, Any]] = [
    {"window": 4, "sinks": 2},
    {"window": 3, "window_kind": "terraced", "decay": "gate", "layers": [0, 2]},
    {"mixer": "blend", "window": 4, "sinks": 2, "kept": {"pairs": 3}},
    {"mixer": "blend", "window": 4, "far": "gated_delta", "layers": [1]},
    {"mixer": "blend", "window": 3, "far": "none", "kept": {"pairs": 2, "fade": 50}, "bits": 8},
]


def config(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4 * 9, "batch_size": 4, "warmup_steps": 1, "lr": 1e-2, "rank": 2}
    settings |= {"passing": {"share": 1.0, "chunks": 2}, "kl_factor": 2.0, "cross_entropy_factor": 0.5}
    return FinetuneConfig(**(settings | changes))


def long_batch(ids: Tensor, chunk: int | None = 7, counted: Tensor | None = None) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool) if counted is None else counted, None, None, chunk)


def stir(model: Any) -> None:
    """Give the second LoRA matrices, which start at zero, some weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("settings", LAYERS, ids=str)
def test_parts_give_the_loss_of_the_whole(make_student: Students, tokens: Tokens, settings: dict[str, Any]) -> None:
    """That of the student, and of a teacher that reads with its full context."""
    stage = FinetuneStage(make_student(**settings), config())
    stir(stage.model)
    ids = tokens(2, 28)
    whole, parts = stage.validate(long_batch(ids, None)), stage.backward(long_batch(ids), 1.0)
    assert whole.keys() == parts.keys() == {"loss", "cross_entropy", "kl"}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=2e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("settings", LAYERS[:3], ids=str)
def test_gradients_are_those_of_a_state_without_one(
    make_student: Students, teacher: Any, tokens: Tokens, settings: dict[str, Any]
) -> None:
    stage = FinetuneStage(make_student(**settings), config(train_feature_maps=True))
    stir(stage.model)
    student, ids = stage.model, tokens(2, 28)
    stage.backward(long_batch(ids), 0.5)
    got = {name: p.grad for name, p in stage.parameters().items()}
    for cut in (True, False):
        for p in stage.parameters().values():
            p.grad = None
        (0.5 * plain_loss(student, teacher, ids, cut)).backward()
        equal = [
            torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-5)
            for name, p in stage.parameters().items()
            if (mine := got[name]) is not None and p.grad is not None
        ]
        assert all(equal) is cut


def plain_loss(student: Any, teacher: Any, ids: Tensor, cut: bool) -> Tensor:
    """The loss of a text by transformers' forward passes over one cache, all of it in one graph."""
    cache, logits = DynamicCache(config=student.config), []
    for part in ids.split(7, 1):
        logits.append(student(part, past_key_values=cache, use_cache=True).logits)
        for layer in cache.layers if cut else ():
            if isinstance(layer, LinearizedLayer):
                layer.state = map_state(layer.state, Tensor.detach)
            else:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()  # type: ignore[union-attr]
    log_s = torch.cat(logits, 1)[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_t = teacher(ids).logits[:, :-1].log_softmax(-1)
    loss = nnf.nll_loss(log_s.flatten(0, 1), ids[:, 1:].flatten())
    return 0.5 * loss + 2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def test_prompts_are_left_out_across_parts(make_student: Students, tokens: Tokens) -> None:
    """A part in which nothing counts only moves the state on."""
    stage, ids = FinetuneStage(make_student(window=4), config(mask_prompt=True)), tokens(2, 28)
    counted = (torch.arange(28) >= 15).expand(2, -1)
    whole = stage.validate(long_batch(ids, None, counted))
    parts = stage.backward(long_batch(ids, 7, counted), 1.0)
    torch.testing.assert_close(parts["loss"], whole["loss"], rtol=1e-4, atol=1e-5)
    assert all(bool(p.grad.isfinite().all()) for p in stage.parameters().values() if p.grad is not None)


def test_full_fine_tuning_passes_states_too(make_student: Students, tokens: Tokens) -> None:
    stage, ids = FinetuneStage(make_student(window=4), config(method="full")), tokens(1, 21)
    whole = stage.validate(long_batch(ids, None))
    torch.testing.assert_close(stage.backward(long_batch(ids), 1.0)["loss"], whole["loss"], rtol=1e-4, atol=1e-5)


def test_mixed_precision_gives_nearly_the_same_gradients(make_student: Students, tokens: Tokens) -> None:
    """Weights that autocast has cast are used again by the next part."""
    gradients = []
    for mixed in (False, True):
        torch.manual_seed(0)  # of the first LoRA matrices
        stage = FinetuneStage(make_student(window=4), config())
        stir(stage.model)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            stage.backward(long_batch(tokens(2, 28)), 1.0)
        gradients.append(torch.cat([p.grad.flatten() for p in stage.parameters().values() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 0.1


def test_kernels_without_gradients_after_a_state_give_way(make_student: Students, tokens: Tokens) -> None:
    student = make_student(mixer="blend", window=4, kept={"pairs": 2}, far="none")
    stage = FinetuneStage(student, config())
    expected = stage.backward(long_batch(tokens(1, 21)), 1.0)["loss"]
    for layer in linearized_layers(student):
        layer.mixer.impl = "triton"
    assert torch.equal(stage.backward(long_batch(tokens(1, 21)), 1.0)["loss"], expected)
    assert {layer.mixer.impl for layer in linearized_layers(student)} == {"triton"}


def test_long_texts_are_not_recorded(make_student: Students, tokens: Tokens) -> None:
    stage = FinetuneStage(make_student(window=4), config())
    graphed = GraphedStage(stage)
    assert torch.equal(
        graphed.backward(long_batch(tokens(1, 14)), 1.0)["loss"], stage.backward(long_batch(tokens(1, 14)), 1.0)["loss"]
    )


# ---- which texts


def rows_of_books(follows: list[int], length: int = 20) -> PackedDataset:
    """Sequences of which those marked go on where the one before ended."""
    ids = np.random.default_rng(0).integers(3, 97, (len(follows), length)).astype(np.int32)
    return PackedDataset(ids, np.ones(ids.shape, bool), np.zeros(ids.shape, np.int32), np.array(follows, bool))


@pytest.fixture
def books(training_data: TrainingData) -> TrainingData:
    """Ten sequences: a text of four, one of two, one alone, one of three."""
    return TrainingData(rows_of_books([0, 1, 1, 1, 0, 1, 0, 0, 1, 1]), training_data.validation)


def test_steps_read_each_text_once_an_epoch(books: TrainingData) -> None:
    passing = passing_of(config(), books.train, 8, seed=3, processes=1)
    assert passing is not None and passing.start == 0
    assert passing.texts.tolist() == [0, 2, 4, 7]
    read = [passing.rows(step, 4, 0, 1) for step in range(2)]
    assert all(part.ids.shape == (2, 40) for part in read)
    found = {part.ids[i].tobytes() for part in read for i in range(2)}
    assert found == {books.train.ids[first : first + 2].tobytes() for first in (0, 2, 4, 7)}
    halves = [passing.rows(1, 4, process, 2).ids for process in (0, 1)]
    assert np.array_equal(np.concatenate(halves), read[1].ids)


def test_the_last_steps_read_long_texts(books: TrainingData) -> None:
    reader = Reader(config(passing={"share": 0.25, "chunks": 2}), books, seed=0)
    assert (reader.steps, reader.passing_start) == (9, 7)
    shapes = [reader.read(step, None).data.ids.shape for step in range(9)]
    assert shapes == [(10, 20)] * 7 + [(2, 40)] * 2
    assert [reader.read(step, None).chunk for step in (6, 7)] == [None, 20]
    assert reader.read(3, None).rows.tolist() == step_rows(10, 3, 4, 0).tolist()


def test_refusals_say_what_to_do(books: TrainingData, training_data: TrainingData, make_teacher: Students) -> None:
    with pytest.raises(ValueError, match="chunks 3 must divide batch_size 4"):
        config(passing={"share": 0.1, "chunks": 3})
    assert config(passing={"chunks": 3}).passing.share == 0
    with pytest.raises(LolcatsError, match=r"4 x 20 tokens, but no training document .* add sources of long documents"):
        Reader(config(passing={"share": 0.1}), training_data, seed=0)
    with pytest.raises(LolcatsError, match=r"makes 2 long texts .* but 3 processes share each step: raise it to 6"):
        Reader(config(), books, seed=0, processes=3)
    short = make_teacher(max_position_embeddings=39)
    with pytest.raises(LolcatsError, match=r"texts of 40 tokens, longer than the context of 39 .*finetune.kl_factor=0"):
        check_reading(config(), books, short, seed=0)
    check_reading(config(kl_factor=0.0), books, short, seed=0)
    check_reading(config(), books, make_teacher(max_position_embeddings=40), seed=0)
    check_reading(config(enabled=False), training_data, short, seed=0)


# ---- whole stages


def run(
    student: Any, data: TrainingData, folder: Path | None = None, reporter: Reporter | None = None, **changes: Any
) -> TrainResult:
    settings: dict[str, Any] = {
        "passing": {"share": 0.5, "chunks": 2},
        "validate_every": 2,
        "checkpoint_every": 3,
        "dropout": 0.2,
    }
    torch.manual_seed(0)
    student.train()
    chosen = config(**({"train_feature_maps": True} | settings | changes))
    return finetune_lora(student, data, chosen, folder=folder, reporter=reporter)[0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LAYERS[2], LAYERS[1]], ids=str)
def test_resumed_is_undisturbed(
    make_student: Students, books: TrainingData, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Killed before, at, and after the first step that reads long texts."""
    whole = make_student(**settings)
    resumed = copy.deepcopy(whole)
    expected = run(whole, books)
    for at in (4, 5, 8):
        with pytest.raises(Killed):
            run(copy.deepcopy(resumed), books, tmp_path, Killer(None, at))
    result = run(resumed, books, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert (result.final, result.best_step, result.tokens) == (expected.final, expected.best_step, 720)


@pytest.mark.slow
def test_micro_batches_give_the_same_training(make_student: Students, books: TrainingData) -> None:
    whole, parts = make_student(window=4), make_student(window=4)
    run(whole, books, dropout=0.0)
    run(parts, books, dropout=0.0, micro_batch_size=1)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("share", "best"), [(0.0, 1), (0.5, 3)])
def test_the_best_weights_are_of_steps_with_long_texts(
    make_student: Students, books: TrainingData, monkeypatch: pytest.MonkeyPatch, share: float, best: int
) -> None:
    """The validation sequences are short, so they cannot tell what the last steps are good for."""
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(FinetuneStage, "validate", lambda self, batch: {"loss": torch.tensor(next(losses))})
    student, passing = make_student(window=4), {"share": share, "chunks": 2}
    assert run(student, books, passing=passing, validate_every=1, tokens=20 * 4 * 4).best_step == best


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_run_passes_states_in_its_last_steps(make_config: Callable[..., RunConfig], packing: str) -> None:
    folder = linearize(
        make_config(f"data.packing={packing}", "finetune.passing.share=0.4", "finetune.passing.chunks=2")
    )
    results = folder.results()
    assert results.complete and results.best["finetune"].step >= 4


def test_a_teacher_reads_its_cache_as_the_plain_model_does(
    make_student: Students, teacher: Any, tokens: Tokens
) -> None:
    student, ids = make_student(window=4, layers=[0, 2]), tokens(2, 21)
    cache = DynamicCache(config=student.config)
    with torch.no_grad(), attention_mode(student, "softmax"):
        parts = [student(part, past_key_values=cache, use_cache=True).logits for part in ids.split(7, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), teacher(ids).logits, rtol=1e-4, atol=1e-4)
