"""What vLLM would be told by `lolcats bench --engine vllm`, and what is said without it; no vLLM is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lolcats.errors import LolcatsError
from lolcats.evaluation.speed import SpeedSettings, Subjects, step_bytes
from lolcats.models.shapes import SHAPES
from lolcats.serving import server
from lolcats.serving.vllm_bench import find_jobs, measure_engine
from lolcats.serving.vllm_bench.jobs import lead_tokens
from lolcats.serving.vllm_bench.run import _answers
from lolcats.serving.vllm_plugin import installed_version

Make = Callable[..., Any]
SETTINGS = SpeedSettings((1, 3), (20,), tokens=4, repeat=1)


def subjects(source: Path | str, teacher: Path | str | None = None, **more: Any) -> Subjects:
    given = {"recipe": None, "random_weights": False, "device": torch.device("cpu"), "dtype": "float32"} | more
    return Subjects(str(source), None if teacher is None else str(teacher), **given)


@pytest.fixture
def folders(make_student: Make, make_teacher: Make, tmp_path: Path) -> tuple[Path, Path]:
    """A student and its teacher, without tokenizers: these are not read."""
    make_student(window=5, sinks=2).save_pretrained(tmp_path / "student")
    make_teacher().save_pretrained(tmp_path / "teacher")
    return tmp_path / "student", tmp_path / "teacher"


def test_a_student_and_its_teacher(folders: tuple[Path, Path], make_student: Make, tmp_path: Path) -> None:
    """Both from their folders; the bytes of a step are those of the models in memory."""
    options = {"max_num_batched_tokens": 40, "block_size": 16}
    student, teacher = find_jobs(subjects(*folders), SETTINGS, tmp_path, options)
    assert (student.variant, student.mixer, teacher.variant, teacher.mixer) == ("student", "hybrid", "teacher", None)
    assert [job.order.arguments["model"] for job in (student, teacher)] == [str(folder) for folder in folders]
    assert "load_format" not in student.order.arguments and student.order.arguments["block_size"] == 16
    real = step_bytes(make_student(window=5, sinks=2))
    assert (student.cost.weights, student.cost.rewritten, student.cost.text(9)) == (
        real.weights, real.rewritten, real.text(9),
    )  # fmt: skip
    assert [tuple(case) for case in student.order.cases] == [(1, 20, 3), (3, 20, 4)]
    assert student.order.arguments["max_model_len"] == 20 + 4 + 4 == teacher.order.arguments["max_model_len"]


def test_configurations_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of recipes and of random weights vLLM is given folders that name the class and hold no weights."""
    found = find_jobs(
        subjects(folders[1], folders[1], recipe="hybrid", random_weights=True), SETTINGS, tmp_path / "recipe", {}
    )
    found += find_jobs(subjects(folders[0], random_weights=True), SETTINGS, tmp_path / "random", {})
    assert [job.variant for job in found] == ["teacher", "student", "student"]
    for job in found:
        folder = Path(job.order.arguments["model"])
        config = AutoConfig.from_pretrained(folder)
        assert job.order.arguments["load_format"] == "dummy" and not list(folder.glob("*.safetensors"))
        assert config.architectures == ["LinearizedLlamaForCausalLM" if job.mixer else "LlamaForCausalLM"]
        assert (getattr(config, "linearization", None) is None) == (job.mixer is None)


def test_a_shape_takes_no_memory(tmp_path: Path) -> None:
    (job,) = find_jobs(subjects("llama-3-8b-shape", dtype="bfloat16"), SETTINGS, tmp_path, {})
    assert job.cost.weights > 14e9 and job.dtype == "bfloat16" and job.order.arguments["load_format"] == "dummy"
    config = AutoConfig.from_pretrained(job.order.arguments["model"])
    assert config.hidden_size == SHAPES["llama-3-8b-shape"]["hidden_size"]


def test_beyond_the_context(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The plugin goes on by itself; a teacher has to be told of more positions."""
    settings = dataclasses.replace(SETTINGS, contexts=(5000,))
    with pytest.raises(LolcatsError, match="longer than the model's context"):
        find_jobs(subjects(*folders), settings, tmp_path, {})
    student, teacher = find_jobs(subjects(*folders), dataclasses.replace(settings, beyond_context=True), tmp_path, {})
    assert "hf_overrides" not in student.order.arguments
    assert teacher.order.arguments["hf_overrides"] == {"max_position_embeddings": 5000 + 4 + 4}


@pytest.mark.parametrize(("batch", "context", "at_once"), [(1, 20, 40), (3, 20, 40), (5, 300, 64), (64, 4096, 8192)])
def test_all_texts_are_read_before_the_first_has_written_its_lead(batch: int, context: int, at_once: int) -> None:
    """Counted step by step: those that decode come first, the rest of a step is for prompts."""
    unread, decoding, steps = [context] * batch, 0, 0
    while unread:
        room, steps = at_once - decoding, steps + 1
        while unread and room:
            taken = min(room, unread[0])
            room, unread[0] = room - taken, unread[0] - taken
            if not unread[0]:
                unread.pop(0)
                decoding += 1
    assert steps < lead_tokens(batch, context, at_once) <= 2 * steps + 2


def test_refusals(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, given, message in (
        ({"dtype": "half"}, subjects(folders[0]), "dtype of vLLM follows from what is measured"),
        ({}, subjects(folders[0], device=torch.device("cuda:1")), "CUDA_VISIBLE_DEVICES"),
        ({}, subjects(folders[0], folders[0]), "is linearized itself"),
        ({}, subjects(tmp_path / "gone"), "no such folder"),
    ):
        with pytest.raises(LolcatsError, match=message):
            find_jobs(given, SETTINGS, tmp_path, options)
    monkeypatch.setattr(server, "installed_version", lambda: None)
    with pytest.raises(LolcatsError, match=r"vLLM is not installed; .*Without it the engine transformers measures"):
        next(measure_engine(subjects(folders[0]), SETTINGS, 1e9))


@pytest.mark.slow
@pytest.mark.skipif(installed_version() is not None, reason="vLLM is installed")
def test_a_process_that_fails_says_why(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (job,) = find_jobs(subjects(folders[0]), SETTINGS, tmp_path, {})
    with pytest.raises(LolcatsError, match=r"vLLM cannot measure the student: ModuleNotFoundError: No module.*vllm"):
        next(_answers(job.order, "student"))
