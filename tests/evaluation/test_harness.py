"""Benchmarks agree with lm-eval run directly on the same files, for any batch and any variant."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lolcats.evaluation import Variant, student_variants, teacher_variants
from lolcats.evaluation.harness.catalog import catalog
from lolcats.evaluation.harness.model import ResumableLM
from lolcats.evaluation.store import AnswerStore

from .conftest import DATA, choices, directly, run, sentence

pytestmark = pytest.mark.usefixtures("one_process")
VARIANTS = ["teacher", "training_free", "equal_window", "student", "window_only", "linear_only", "no_attention"]


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted({name.rpartition("_")[0] for name in DATA}))
def test_numbers_are_those_of_lm_eval(
    task: str,
    model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every metric of every kind of task, to the last bit, in batches and in pieces."""
    monkeypatch.setattr("lolcats.evaluation.harness.model.PIECE", 3)
    examples = {"gsm8k": 2} if task == "gsm8k" else {}
    got = run({"teacher": Variant(model)}, tiny_tokenizer, [task], folder, batch_size=2, examples=examples)
    wanted = directly(model, tiny_tokenizer, [task], folder, batch_size=2, num_fewshot=examples.get(task))
    assert got.results["teacher"]["default"] == wanted
    paper = {"hellaswag": "acc_norm,none", "arc_challenge": "acc_norm,none", "piqa": "acc,none"}
    assert got.rows[0].metric == paper.get(task, got.rows[0].metric)
    assert got.rows[0].examples == str(examples.get(task, 0))


@pytest.mark.slow
def test_tasks_of_one_call_do_not_touch_each_other(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """One request at a time, as is the default, lm-eval says the same of several tasks at once."""
    tasks = ["piqa", "lambada_openai"]
    got = run({"teacher": Variant(model)}, tiny_tokenizer, tasks, folder, limit=9)
    assert got.results["teacher"]["default"] == directly(model, tiny_tokenizer, tasks, folder, batch_size=1, limit=9)


@pytest.mark.slow
def test_variants_stand_in_one_table(
    model: PreTrainedModel,
    make_student: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """The teacher is the plain model to the last bit; and batches give what single requests give."""
    tasks = ["wikitext"]
    student = make_student(model, window=4)
    variants = teacher_variants(make_student(model, window=4)) | student_variants(student, VARIANTS)
    single = run(variants, tiny_tokenizer, tasks, folder)
    assert list(single.rows[0].scores) == VARIANTS
    plain = run({"teacher": Variant(model)}, tiny_tokenizer, tasks, folder)
    assert single.results["teacher"] == plain.results["teacher"]
    batched = run(variants, tiny_tokenizer, tasks, folder, batch_size=3)
    one, many = (
        {name: scores.results[name]["default"]["wikitext"]["bits_per_byte,none"] for name in VARIANTS}
        for scores in (single, batched)
    )
    assert many == pytest.approx(one, rel=1e-4)
    # This student's own weights are still the teacher's, and without its linear half nothing else is left.
    assert one["window_only"] == one["training_free"] and len(set(one.values())) == len(VARIANTS) - 1


@pytest.mark.slow
def test_texts_do_not_depend_on_the_batch(
    model: PreTrainedModel, make_student: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A student goes on with padded prompts as with single ones; settings that differ are kept apart."""
    student = make_student(model, window=4)
    requests = [
        Instance("generate_until", {}, (sentence(s, s + 1), {"until": ["<end>"], "max_gen_toks": 4 + s % 2}), 0)
        for s in range(7)
    ]
    texts = [
        ResumableLM(student, tiny_tokenizer, batch_size=n, store=AnswerStore(), identity="").generate_until(requests)
        for n in (1, 3)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3


@pytest.mark.slow
def test_a_group_is_divided_by_subject_and_has_five_examples(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """One file for all of MMLU: each part as lm-eval scores it from a file of its own."""
    subjects = [str(catalog().source(task).name) for task in catalog().leaves("mmlu")]
    assert len(subjects) == 57

    def rows(subject: str, split: str, count: int) -> list[str]:
        seeds = range(len(subject + split), len(subject + split) + count)
        row = [{"question": sentence(s), "choices": choices(s)["text"], "answer": s % 4} for s in seeds]
        return [json.dumps({**r, "subject": subject}) + "\n" for r in row]

    for split, count in ("test", 2), ("dev", 5):
        text = [line for subject in subjects for line in rows(subject, split, count)]
        (tmp_path / f"mmlu_{split}.jsonl").write_text("".join(text))
        (tmp_path / f"mmlu_anatomy_{split}.jsonl").write_text("".join(rows("anatomy", split, count)))
    short = tmp_path / "group"
    short.mkdir()
    for split in ("test", "dev"):
        (tmp_path / f"mmlu_{split}.jsonl").rename(short / f"mmlu_{split}.jsonl")
    model.config.max_position_embeddings = 4000
    got = run({"teacher": Variant(model)}, tiny_tokenizer, ["mmlu"], short, limit=1)
    assert [(row.task, row.examples, row.questions, row.metric) for row in got.rows] == [("mmlu", "5", 57, "acc,none")]
    results = got.results["teacher"]["default"]
    wanted = directly(model, tiny_tokenizer, ["mmlu_anatomy"], tmp_path, batch_size=1, num_fewshot=5, limit=1)
    assert results["mmlu_anatomy"] == wanted["mmlu_anatomy"]
    parts = [results[task]["acc,none"] for task in catalog().leaves("mmlu")]
    assert got.rows[0].scores["teacher"].mean == pytest.approx(sum(parts) / 57) and len(set(parts)) == 2


@pytest.mark.slow
def test_seeds_have_a_mean_and_a_spread(
    model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Examples are drawn anew for each seed, and as lm-eval draws them."""
    how = {"examples": {"lambada_openai": 2}, "limit": 5}
    got = run({"teacher": Variant(model)}, tiny_tokenizer, ["lambada_openai"], folder, seeds=(0, 7), **how)
    for seed in (0, 7):
        seeds = {f"{name}_seed": seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
        seeds = {name.replace("random_random", "random"): value for name, value in seeds.items()}
        direct = directly(
            model, tiny_tokenizer, ["lambada_openai"], folder, batch_size=1, num_fewshot=2, limit=5, **seeds
        )
        assert got.results["teacher"][str(seed)] == direct
    perplexity = [got.results["teacher"][s]["lambada_openai"]["perplexity,none"] for s in ("0", "7")]
    assert perplexity[0] != perplexity[1]
    score = got.rows[0].scores["teacher"]
    assert score.mean == sum(score.values) / 2 and score.sd is not None
