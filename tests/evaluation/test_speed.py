"""What `lolcats bench` measures: its rows, the bytes of a step, and what happens where memory runs out."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_cases import with_stand_in
from lolcats.errors import LolcatsError, is_out_of_memory
from lolcats.evaluation.speed import (
    Row,
    SpeedSettings,
    Subjects,
    Times,
    copy_bandwidth,
    measure_speed,
    measure_times,
    step_bytes,
    to_csv,
)
from lolcats.evaluation.speed.measure import EAGER, GRAPH, WARM
from lolcats.modeling import linearized_layers
from lolcats.models.shapes import random_model
from tiny import perturb

Make = Callable[..., Any]
BANDWIDTH = 1e9
CPU = torch.device("cpu")


def weights_of(config: Any) -> int:
    """Numbers in the weights of the tiny Llama that a step reads, counted by hand: no table of embeddings."""
    d, inner, heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads + config.num_key_value_heads,
    )
    layer = 2 * d * config.head_dim * heads + 3 * d * inner + 2 * d
    return config.num_hidden_layers * layer + d + d * config.vocab_size


def test_bytes_of_a_teacher(make_teacher: Make) -> None:
    """Weights once, and of each text 2 key heads x 6 numbers x 4 bytes, keys and values, in each of 3 layers."""
    model = make_teacher()
    cost = step_bytes(model)
    assert cost.weights == 4 * weights_of(model.config)
    assert (cost.rewritten, cost.text(10)) == (0, 3 * 2 * 2 * 6 * 4 * 10)
    assert cost.moved(5, 10) == cost.weights + 5 * cost.text(10)
    tied = make_teacher(tie_word_embeddings=True)
    assert step_bytes(tied).weights == cost.weights, "the table is read as the output's"


def test_bytes_of_hybrid(make_student: Make) -> None:
    """A state per query head, features x 6 numbers and their sums, is written in one of 4 steps; 10 keys beside it."""
    student = make_student(window=5, sinks=2, feature_map="hedgehog", fold=4)
    cost, teacher = step_bytes(student), 4 * weights_of(student.config)
    added = sum(p.numel() * 4 for layer in linearized_layers(student) for p in layer.mixer.parameters())
    features = linearized_layers(student)[0].mixer.state_spec(torch.float32).shapes[0][1]
    sums, near = 6 * features * (6 + 1) * 4, (2 + 5 + 3) * 2 * 2 * 6 * 4  # sinks, window, keys that wait
    assert cost.weights == teacher + added
    assert cost.rewritten == 3 * (sums // 4 + 8)
    assert cost.text(10) == cost.text(1000) == 3 * (sums + near + 8)
    assert cost.moved(5, 10) == cost.weights + 5 * 3 * (sums + sums // 4 + 2 * 8 + near)
    terraced = step_bytes(make_student(window=4, window_kind="terraced"))
    assert terraced.rewritten == 3 * (sums // 4 + 8), "a window of its own is a block"


def test_bytes_of_blend_beside_softmax(make_student: Make) -> None:
    """8 bits: 6 codes and 2 bytes of scale a key and a value; a layer that stays softmax has its keys and values."""
    student = make_student(
        mixer="blend", far="none", window=5, sinks=2, bits=8, layers=[0, 2], kept={"pairs": 4, "score": "learned"}
    )
    cost = step_bytes(student)
    pairs, scores = 2 * (5 + 2 + 4) * 2 * (6 + 2), 2 * (5 + 4) * 4 + 2 * 4 * 4  # also the places of kept pairs
    assert cost.rewritten == 2 * 8, "only lengths"
    assert cost.text(10) == 2 * (pairs + scores + 8) + 10 * 2 * 2 * 6 * 4


@pytest.mark.slow
def test_rows(make_student: Make, make_teacher: Make) -> None:
    """A row a model, batch and context, each as its numbers say; what a text takes is what the cache holds."""
    settings = SpeedSettings((1, 3), (9, 17), tokens=2, repeat=2)
    models = iter([("student", make_student(window=5, sinks=2)), ("teacher", make_teacher())])
    seen: list[tuple[str, int, int | None]] = []
    rows = list(measure_speed(models, settings, BANDWIDTH, lambda *given: seen.append(given)))
    cases = [(v, b, n) for v in ("student", "teacher") for n in (9, 17) for b in (1, 3)]
    assert [(row.variant, row.batch, row.context) for row in rows] == cases
    assert seen[5] == ("teacher, batch 3, context 9", 1, 4)
    assert [row.attention for row in rows] == ["hybrid"] * 4 + ["sdpa"] * 4
    for row in rows:
        step, first = row.times.step, row.times.first_token
        assert step is not None and first is not None and row.ratio is not None and row.times.steps == EAGER
        assert row.times.memory == row.text_bytes and row.times.reading_memory is None
        assert row.limit == row.step_bytes / BANDWIDTH and row.ratio == step / row.limit
        assert row.decode_speed == row.batch / step and row.prefill_speed == row.batch * row.context / first
    teacher = rows[-1]
    assert teacher.text_bytes == 3 * 2 * 2 * 6 * 4 * (17 + WARM + 2)
    assert teacher.step_bytes == teacher.weight_bytes + 3 * 3 * 2 * 2 * 6 * 4 * (17 + WARM + 1)


@pytest.mark.slow
def test_graphs_are_what_counts(make_student: Make, make_teacher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that replays says so; a teacher is also recorded with a static cache, and the faster one counts."""
    student = make_student(window=5, sinks=2)
    with_stand_in(student)
    times = measure_times(student, 2, 9, 2, 1)
    assert times.steps == GRAPH and times.memory == state_bytes_of(student)
    replays: list[int] = []
    monkeypatch.setattr("lolcats.evaluation.speed.measure.AT_ONCE", 8)  # a static cache is filled in pieces

    def record(step: Any) -> Any:
        def replay() -> None:
            replays.append(1)  # at once: surely faster than the model

        return step(), replay

    times = measure_times(make_teacher(), 2, 9, 3, 2, record)
    assert times.steps == GRAPH and len(replays) == 2 * (WARM + 3)
    assert times.memory == 3 * 2 * 2 * 6 * 4 * (9 + 2 * WARM + 3 + 1), "what the static cache has room for"

    def fails(step: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert measure_times(make_teacher(), 2, 9, 3, 2, fails).steps == EAGER


def state_bytes_of(student: Any) -> int:
    """Of one text."""
    return sum(layer.mixer.state_spec(student.dtype).nbytes for layer in linearized_layers(student))


@pytest.mark.slow
def test_no_memory_is_a_cell(make_teacher: Make) -> None:
    """Prompts of more bytes than any machine has, asked of torch itself; and texts, which are not even tried."""
    with pytest.raises(RuntimeError) as refused:
        torch.zeros(10**9, 10**5)
    assert is_out_of_memory(refused.value) and not is_out_of_memory(ValueError("can't allocate memory"))
    times = measure_times(make_teacher(), 10**9, 10**5, 1, 1)
    assert times == Times()
    settings = SpeedSettings((10**10, 1), (8,), tokens=1, repeat=1)
    full, row = measure_speed(iter([("teacher", make_teacher())]), settings, BANDWIDTH)
    assert full.times == Times() and full.limit > 0 and row.times.step
    assert full.ratio is full.decode_speed is full.prefill_speed is None


@pytest.mark.slow
def test_prompts_that_do_not_fit_are_read_in_pieces(make_student: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is measured though reading all prompts at once is not."""
    student = make_student(window=5, sinks=2)
    whole, pieces = student.forward, list[int]()

    def forward(ids: torch.Tensor, **given: Any) -> Any:
        if ids.shape[1] > 4:
            raise torch.OutOfMemoryError("no memory for so many tokens")
        pieces.append(ids.shape[1])
        return whole(ids, **given)

    monkeypatch.setattr(student, "forward", forward)
    monkeypatch.setattr("lolcats.evaluation.speed.measure.AT_ONCE", 8)
    times = measure_times(student, 2, 11, 2, 1)
    assert times.first_token is None and times.step is not None and times.memory == state_bytes_of(student)
    assert pieces[:3] == [4, 4, 3] and pieces[3:5] == [1, 1]


def test_rows_that_are_there_are_kept(make_teacher: Make) -> None:
    """Rows come one by one, so whoever is interrupted has those before."""
    rows = measure_speed(iter([("teacher", make_teacher())]), SpeedSettings((1, 2), (8,), 1, 1), BANDWIDTH)
    assert [row.batch for row in islice(rows, 1)] == [1]


def test_csv() -> None:
    times = Times(0.5, 0.25, EAGER, 100.0)
    row = Row("transformers", "teacher", "sdpa", "float32", 2, 8, 4, times, 0.125, 60, 20, 30)
    full = Row("transformers", "student", "hybrid", "float32", 2, 8, 4, Times(), 0.125, 60, 20, 30)
    first, second = csv.DictReader(io.StringIO(to_csv([row, full], {"device": "cpu, 1 threads"})))
    assert (first["engine"], first["step_seconds"], first["ratio"]) == ("transformers", "0.25", "2.0")
    assert (first["prefill_tokens_per_second"], first["decode_tokens_per_second"]) == ("32.0", "8.0")
    assert first["device"] == second["device"] == "cpu, 1 threads" and second["step_seconds"] == ""
    assert to_csv([], {}).strip() == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"batches": ()}, "batch"), ({"batches": (1, 0)}, "batch: expected numbers from 1 on; got 1, 0"),
     ({"contexts": (0,)}, "context"), ({"tokens": 0}, "tokens"), ({"repeat": 0}, "repeat")],
)  # fmt: skip
def test_settings_are_numbers_from_one_on(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LolcatsError, match=said):
        SpeedSettings(**settings)


def test_contexts_end_where_the_model_does(make_teacher: Make) -> None:
    rest = 32 + 2 * WARM + 1
    model = make_teacher(max_position_embeddings=4096 + rest)
    assert SpeedSettings().contexts_of(model) == [1024, 4096]
    assert SpeedSettings().contexts_of(make_teacher(max_position_embeddings=100)) == [100 - rest]
    with pytest.raises(LolcatsError, match="longer than the model's context"):
        SpeedSettings(contexts=(4097,)).contexts_of(model)
    assert SpeedSettings(contexts=(4097,), beyond_context=True).contexts_of(model) == [4097]
    with pytest.raises(LolcatsError, match="no room for 39 new ones"):
        SpeedSettings().contexts_of(make_teacher(max_position_embeddings=30))


@pytest.mark.slow
def test_subjects(model_folder: Path, make_student: Make, tmp_path: Path) -> None:
    """A linearized model and its teacher; or a model before and after its conversion by a recipe."""

    def subjects(source: object, teacher: str | None, recipe: str | None = None, random: bool = False) -> list[Any]:
        found = Subjects(str(source), teacher, recipe, random, CPU, "float32").each()
        return [(variant, len(linearized_layers(model)), model.dtype) for variant, model in found]

    plain, both = [("teacher", 0, torch.float32)], [("teacher", 0, torch.float32), ("student", 2, torch.float32)]
    assert subjects(model_folder, None) == plain
    assert subjects(model_folder, str(model_folder), "small") == subjects(model_folder, "x", "hybrid") == both
    assert subjects(model_folder, None, "hybrid") == both[1:]
    alone = tmp_path / "config"
    alone.mkdir()
    (alone / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    assert subjects(alone, None, random=True) == plain
    with pytest.raises(LolcatsError, match="no weights"):
        subjects(alone, None)


def test_random_weights_of_a_linearized_model(make_student: Make, tmp_path: Path) -> None:
    """Its configuration makes the same layers."""
    student = perturb(make_student(window=5, sinks=2))
    student.config.save_pretrained(tmp_path)
    made = random_model(str(tmp_path), torch.bfloat16, CPU)
    assert made.dtype == torch.bfloat16 and not made.training
    assert [layer.mixer.state_spec(made.dtype) for layer in linearized_layers(made)] == [
        layer.mixer.state_spec(torch.bfloat16) for layer in linearized_layers(student)
    ]
    assert state_bytes_of(made) < state_bytes_of(student)


def test_bandwidth_is_that_of_a_copy() -> None:
    """Between a floppy disk and what no memory does."""
    assert 1e6 < copy_bandwidth(CPU, 2**20) < 1e13 and math.isfinite(copy_bandwidth(CPU, 2**20))


@pytest.mark.gpu
def test_on_a_gpu(make_student: Make, make_teacher: Make) -> None:
    """Both decode by CUDA graphs, peaks are above what the texts take, and what does not fit is a cell."""
    settings = SpeedSettings((1, 4), (300,), tokens=4, repeat=2)
    student = make_student(window=5, sinks=2).cuda()
    rows = list(measure_speed(iter([("student", student), ("teacher", make_teacher().cuda())]), settings, BANDWIDTH))
    assert [row.times.steps for row in rows] == [GRAPH] * 4
    for row in rows:
        assert row.times.memory is not None and row.times.memory >= row.text_bytes
        assert row.times.reading_memory is not None and row.times.first_token and row.times.step
    assert measure_times(student, 10**7, 10**4, 1, 1) == Times()
    eager = SpeedSettings((2,), (300,), tokens=4, repeat=1, graphs=False)
    (row,) = measure_speed(iter([("teacher", make_teacher().cuda())]), eager, BANDWIDTH)
    assert row.times.steps == EAGER
