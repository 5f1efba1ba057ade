"""What cannot be measured is refused in a line; what was interrupted goes on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lolcats.errors import LolcatsError
from lolcats.evaluation import Variant, student_variants
from lolcats.evaluation.harness import run_benchmarks
from lolcats.evaluation.store import AnswerStore
from lolcats.identity import model_identity

from .conftest import ROWS, run

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(
    model: PreTrainedModel,
    make_student: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in the middle of a task: what was answered is not asked again, of any variant."""
    monkeypatch.setattr("lolcats.evaluation.harness.model.PIECE", 2)
    student = make_student(model, window=4)
    variants = student_variants(student, ["window_only"])
    asked: list[tuple[int, ...]] = []
    student.register_forward_pre_hook(lambda module, args: asked.append(tuple(args[0].shape)))
    tasks = ["piqa", "hellaswag"]
    whole = run(variants, tiny_tokenizer, tasks, folder, batch_size=2, seeds=(1, 2))
    needed = len(asked)

    def interrupt(label: str, done: int, count: int | None) -> None:
        if label == "hellaswag, student, seed 1" and done >= 2 * ROWS:
            assert count == 4 * ROWS
            raise KeyboardInterrupt

    asked.clear()
    file = tmp_path / "progress"
    with pytest.raises(KeyboardInterrupt):
        run(
            variants, tiny_tokenizer, tasks, folder, batch_size=2, seeds=(1, 2), store=AnswerStore(file), show=interrupt
        )
    before = len(asked)
    assert 0 < before < needed
    asked.clear()
    resumed = run(variants, tiny_tokenizer, tasks, folder, batch_size=2, seeds=(1, 2), store=AnswerStore(file))
    assert resumed == whole
    assert before + len(asked) == needed
    asked.clear()
    assert run(variants, tiny_tokenizer, tasks, folder, batch_size=2, seeds=(1, 2), store=AnswerStore(file)) == whole
    assert not asked


def test_other_weights_find_nothing(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """One number of one weight changes the identity, and so do two that change places."""
    before = model_identity(model, tiny_tokenizer)
    assert model_identity(model, tiny_tokenizer) == before
    weight = next(model.parameters())
    with torch.no_grad():
        weight[3, 2] += 1e-3
        changed = model_identity(model, tiny_tokenizer)
        weight[3, 2] -= 1e-3
        weight[[0, 1]] = weight[[1, 0]]
    assert len({before, changed, model_identity(model, tiny_tokenizer)}) == 3


def test_progress_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """A file that is no progress is neither read nor overwritten."""
    (tmp_path / "x.progress").write_text("my notes, which are much longer than the header of a database\n" * 20)
    with pytest.raises(LolcatsError, match=r"x\.progress cannot hold finished answers: .* move it away"):
        AnswerStore(tmp_path / "x.progress")
    assert (tmp_path / "x.progress").read_text().startswith("my notes")


@pytest.mark.slow
def test_prompts_too_long_are_refused_or_counted(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """lm-eval cuts them without a word; and a text may need more room than the model has."""
    model.config.max_position_embeddings = 60
    teacher = {"teacher": Variant(model)}
    with pytest.raises(LolcatsError, match=r"piqa: \d+ of 46 prompts are too long, .* takes 60; .*cut them"):
        run(teacher, tiny_tokenizer, ["piqa"], folder)
    cut = run(teacher, tiny_tokenizer, ["piqa"], folder, truncate=True)
    assert 0 < cut.truncated["piqa"] <= 46
    with pytest.raises(LolcatsError, match=r"triviaqa asks for texts of 256 tokens and the model takes 60"):
        run(teacher, tiny_tokenizer, ["triviaqa"], folder, truncate=True)
    model.config.max_position_embeddings = 275
    with pytest.raises(LolcatsError, match=r"triviaqa: \d of 3 prompts are too long"):
        run(teacher, tiny_tokenizer, ["triviaqa"], folder)


def test_tokenizers_that_do_not_fit(
    make_teacher: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """More tokens than the model has; or a chat template that is not there."""
    with pytest.raises(LolcatsError, match=r"tokens up to number \d+ and the model knows 97"):
        run({"teacher": Variant(make_teacher())}, tiny_tokenizer, ["piqa"], folder)
    model = make_teacher(vocab_size=len(tiny_tokenizer))
    with pytest.raises(LolcatsError, match="no chat template"):
        run({"teacher": Variant(model)}, tiny_tokenizer, ["piqa"], folder, chat=True)


def test_lm_eval_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it there is one line, before anything is loaded."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LolcatsError, match=r'pip install "lolcats\[eval\]"'):
        run_benchmarks("./nowhere", ["piqa"])
