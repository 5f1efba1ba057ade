"""Recall as a whole: models that can and cannot do it, batches, interruption, what is refused, and the plot."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from lolcats.errors import LolcatsError
from lolcats.evaluation import Variant, student_variants, teacher_variants
from lolcats.evaluation.recall import TASKS, Cell, RecallSettings, make_prompts, recall
from lolcats.evaluation.recall.plot import check_plot, plot_recall
from lolcats.evaluation.recall.run import answer
from lolcats.evaluation.store import AnswerStore

from .test_recall_prompts import solve

Teachers = Callable[..., LlamaForCausalLM]
LENGTH = 1600


class Reader(LlamaForCausalLM):
    """A model that reads the answers out of the last `sight` characters of the prompt by rule, in place of layers."""

    tokenizer: PreTrainedTokenizerFast
    sight: int | None = None
    asked = 0

    def generate(self, ids: Any, max_new_tokens: int = 0, pad_token_id: int = 0, **_: Any) -> Any:  # type: ignore[override]
        """The prompts [rows, n] and their answers."""
        rows = []
        for row in ids:
            self.asked += 1
            prompt = self.tokenizer.decode(row, skip_special_tokens=True)
            name = next(name for name, start in STARTS.items() if str(prompt).startswith(start))
            found = [a for a in solve(name, str(prompt)) if a in str(prompt)[-(self.sight or 10**6) :]]
            written = self.tokenizer(f" {', '.join(found)}.")["input_ids"][:max_new_tokens]  # type: ignore[index]
            rows.append(torch.tensor(written))
        new = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        return torch.cat([ids, new], 1)


STARTS = {"passkey": "There is", "vt": "Follow", "niah_single_1": "A few"}


@pytest.fixture
def reader(make_teacher: Teachers, tiny_tokenizer: PreTrainedTokenizerFast) -> Reader:
    """A `Reader` of whole prompts."""
    model: Any = make_teacher(vocab_size=len(tiny_tokenizer))
    model.__class__ = Reader
    model.tokenizer = tiny_tokenizer
    return model


def settings(**changes: Any) -> RecallSettings:
    return RecallSettings(**({"tasks": ["passkey"], "lengths": [LENGTH], "samples": 8, "depths": 4} | changes))


@pytest.mark.slow
def test_a_model_that_can_do_it_scores_everything(reader: Reader, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = settings(tasks=["passkey", "niah_single_1", "niah_multikey", "niah_multiquery"])
    cells = recall({"teacher": Variant(reader)}, tiny_tokenizer, asked, batch_size=3)
    assert [(cell.task, cell.length) for cell in cells] == [(task, LENGTH) for task in asked.tasks]
    assert all(cell.score == 1 for cell in cells)
    assert [cell.by_depth for cell in cells] == [[1.0] * 4] * 3 + [[]]


def test_a_model_that_sees_the_end_alone_misses_what_came_before(
    reader: Reader, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reader.sight = 900
    (cell,) = recall({"teacher": Variant(reader)}, tiny_tokenizer, settings())
    assert cell.by_depth[0] == 0 and cell.by_depth[-1] == 1
    assert cell.score == sum(s["score"] for s in cell.samples) / 8
    assert all(s["score"] == float(s["answers"][0] in s["output"]) for s in cell.samples)


@pytest.mark.slow
def test_batches_padded_or_not_give_the_answers_of_single_prompts(
    make_student: Callable[..., Any], make_teacher: Teachers, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    student = make_student(make_teacher(vocab_size=len(tiny_tokenizer)), window=6, sinks=2)
    asked = [make_prompts("vt", tiny_tokenizer, n, samples=1, depths=1, seed=n)[0] for n in (1000, 900, 1000, 1100)]
    assert len({len(prompt.ids) for prompt in asked}) > 1
    one, three = (
        answer(Variant(student), tiny_tokenizer, asked, new_tokens=9, settled=lambda *_: False, batch_size=size)
        for size in (1, 3)
    )
    assert one == three and len(set(one)) > 1


def test_an_answer_ends_when_it_is_settled(make_teacher: Teachers, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_teacher(vocab_size=len(tiny_tokenizer))
    asked = make_prompts("vt", tiny_tokenizer, 1000, samples=2, depths=1, seed=0)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    answer(Variant(model), tiny_tokenizer, asked, new_tokens=9, settled=lambda *_: False)
    answer(Variant(model), tiny_tokenizer, asked, new_tokens=9, settled=lambda *_: True)
    assert len(steps) == 9 + 1


@pytest.mark.slow
def test_modes_are_entered_and_scored_apart(
    make_student: Callable[..., Any], make_teacher: Teachers, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    student = make_student(make_teacher(vocab_size=len(tiny_tokenizer)), window=6)
    variants = student_variants(student, ["window_only"]) | teacher_variants(student)
    cells = recall(variants, tiny_tokenizer, settings(samples=2, lengths=[400]))
    assert [cell.variant for cell in cells] == list(variants)
    outputs = {cell.variant: cell.samples[0]["output"] for cell in cells}
    assert outputs["student"] != outputs["teacher"] and outputs["window_only"] == outputs["training_free"]


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(
    reader: Reader, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    asked = settings(tasks=["passkey", "niah_single_1"], lengths=[700, LENGTH])
    variants = {"teacher": Variant(reader)}
    whole = recall(variants, tiny_tokenizer, asked)
    file, reader.asked = tmp_path / "progress", 0

    def stop(name: str, done: int, count: int) -> None:
        assert count == 4
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recall(variants, tiny_tokenizer, asked, store=AnswerStore(file), report=stop)
    assert reader.asked == 3 * 8
    with AnswerStore(file) as store:
        assert recall(variants, tiny_tokenizer, asked, store=store) == whole
        assert reader.asked == 4 * 8
        recall(variants, tiny_tokenizer, settings(lengths=[700], seed=1), store=store)
        assert reader.asked == 5 * 8, "another seed asks other prompts"
    assert not file.exists()


def test_what_cannot_be_asked_is_refused(make_teacher: Teachers, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_teacher(vocab_size=len(tiny_tokenizer), max_position_embeddings=512)
    variants = {"teacher": Variant(model)}
    with pytest.raises(LolcatsError, match="no tokenizer"):
        recall(variants, None, settings())
    with pytest.raises(LolcatsError, match=r"1,600 tokens is longer than .* context of 512 .*allow what is beyond"):
        recall(variants, tiny_tokenizer, settings())
    assert recall(variants, tiny_tokenizer, settings(samples=1, lengths=[700], beyond_context=True))
    small = {"teacher": Variant(make_teacher(vocab_size=97))}
    with pytest.raises(LolcatsError, match="the model has 97"):
        recall(small, tiny_tokenizer, settings())


def test_tables_of_positions_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_positions=700, n_embd=8, n_layer=1, n_head=1)
    variants = {"teacher": Variant(GPT2LMHeadModel(config).eval())}
    (cell,) = recall(variants, tiny_tokenizer, settings(samples=2, lengths=[700]))
    assert cell.samples[0]["tokens"] > 600
    with pytest.raises(LolcatsError, match=r"choose at most 700$"):
        recall(variants, tiny_tokenizer, settings(lengths=[701], beyond_context=True))


def cell(variant: str, task: str, length: int, by_depth: list[float | None]) -> Cell:
    return Cell(variant, task, length, 0.5, by_depth, [])


def test_plots_need_matplotlib_a_folder_and_a_depth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LolcatsError, match=r"lolcats\[report\]"):
        check_plot(tmp_path / "a.png", ["passkey"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_plot(tmp_path / "a.png", ["passkey", "vt"])
    for file, tasks, message in [
        ("a.jpg", ["passkey"], "ends in .png"),
        ("gone/a.png", ["passkey"], "no folder"),
        ("a.png", ["vt"], "no depth"),
    ]:
        with pytest.raises(LolcatsError, match=message):
            check_plot(tmp_path / file, tasks)


@pytest.mark.slow
def test_a_plot_has_a_panel_a_task_and_variant(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [
        cell(variant, task, length, [None, 1.0] if TASKS[task].by_depth else [])
        for task in ("passkey", "niah_single_1", "vt")
        for length in (512, 1024)
        for variant in ("teacher", "student")
    ]
    plot_recall(cells, tmp_path / "a.svg", str.upper)
    drawn = (tmp_path / "a.svg").read_text()
    for words in ("STUDENT", "1024", "50-100", "niah_single_1"):
        assert f"<!-- {words} -->" in drawn or f"<!-- {words}\n" in drawn
    assert "<!-- vt" not in drawn and drawn.count("<!-- 100 -->") >= 8
    assert [file.name for file in tmp_path.iterdir()] == ["a.svg"]
