"""Small files of the tasks of lm-eval, and how a test runs them, by this package and by lm-eval itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lolcats.evaluation import Variant
from lolcats.evaluation.harness.catalog import catalog
from lolcats.evaluation.harness.run import HarnessSettings, load_benchmarks, measure_benchmarks
from lolcats.evaluation.harness.scores import Scores
from lolcats.silence import quiet

WORDS = ["river", "valley", "mill", "miller", "daughter", "stone", "wall", "star", "green", "turns", "above", "every"]
ROWS = 23
"""Questions a task: with batches of two, several pieces are kept."""


def sentence(seed: int, length: int = 6) -> str:
    """A few words, other ones for another seed."""
    return " ".join(WORDS[(seed * 7 + i * (seed % 5 + 1)) % len(WORDS)] for i in range(length + seed % 4))


def choices(seed: int, labels: str = "ABCD") -> dict[str, list[str]]:
    """As in the data sets ARC and OpenBookQA."""
    return {"text": [sentence(seed + i, 2) for i in range(len(labels))], "label": list(labels)}


def arc(seed: int) -> dict[str, Any]:
    """Some rows of ARC have labels 1 to 4, or three choices."""
    labels = ("ABCD", "1234", "ABC")[seed % 3]
    return {"id": f"q{seed}", "question": sentence(seed), "choices": choices(seed, labels), "answerKey": labels[1]}


def hellaswag(seed: int) -> dict[str, Any]:
    """With the fields that lm-eval's own preparation reads."""
    endings = [sentence(seed + i, 3) + " [title] end" for i in range(4)]
    context = {"activity_label": "Milling", "ctx_a": sentence(seed) + ".", "ctx_b": "she", "label": str(seed % 4)}
    return {"ind": seed, **context, "endings": endings}


def trivia(seed: int) -> dict[str, Any]:
    """Answers nested in an object; one looks like a date."""
    return {"question": sentence(seed), "answer": {"aliases": ["2020-01-01", sentence(seed, 1)], "value": "x"}}


def winogrande(seed: int) -> dict[str, Any]:
    """The choices are in the context, not in what follows it."""
    text = f"{sentence(seed)} _ {sentence(seed + 1)}"
    return {"sentence": text, "option1": "river", "option2": "mill", "answer": str(seed % 2 + 1)}


DATA: dict[str, Callable[[int], dict[str, Any]]] = {
    "piqa_validation": lambda s: {
        "goal": sentence(s),
        "sol1": sentence(s + 1),
        "sol2": sentence(s + 2),
        "label": s % 2,
    },
    "arc_challenge_test": arc,
    "hellaswag_validation": hellaswag,
    "winogrande_validation": winogrande,
    "lambada_openai_test": lambda s: {"text": sentence(s, 9)},
    "wikitext_test": lambda s: {"page": f"= {sentence(s)} =\n {sentence(s, 60)} .\n"},
    "triviaqa_validation": trivia,
    "gsm8k_test": lambda s: {"question": sentence(s), "answer": f"{sentence(s)} #### {s}"},
    "gsm8k_train": lambda s: {"question": sentence(s + 50), "answer": f"{sentence(s)} #### {s}"},
}
GENERATED = ("triviaqa", "gsm8k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for each entry of DATA."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, make in DATA.items():
        rows = 3 if name.startswith(GENERATED) else ROWS
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make(s)) + "\n" for s in range(rows)))
    return folder


@pytest.fixture
def model(make_teacher: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A tiny Llama that knows the tokens of the tiny tokenizer."""
    return make_teacher(vocab_size=len(tiny_tokenizer), max_position_embeddings=700)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval otherwise forks to draw its bootstrap samples."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def run(
    variants: dict[str, Variant], tokenizer: PreTrainedTokenizerFast, tasks: list[str], folder: Path, **settings: Any
) -> Scores:
    """Load and measure, without the files of a model."""
    store, show = settings.pop("store", None), settings.pop("show", None)
    how = HarnessSettings(task_data=folder, **settings)
    with quiet():
        return measure_benchmarks(variants, tokenizer, load_benchmarks(tasks, how), how, store, show)


def local(task: str, folder: Path) -> dict[str, Any]:
    """A task of lm-eval with the same files, read by the loader of `datasets` for JSON instead of ours."""
    config = catalog().manager.task_index[task].cfg
    assert config is not None
    splits = [config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    files = {s: str(folder / f"{task}_{s}.jsonl") for s in splits if (folder / f"{task}_{s}.jsonl").exists()}
    files |= {s: next(iter(files.values())) for s in splits if s and s not in files}
    how = {"data_files": files, "cache_dir": str(folder / "cache")}
    return {"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": how}


def directly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: list[str], folder: Path, **settings: Any
) -> dict[str, Any]:
    """What lm-eval itself says of tasks in one call."""
    batch = settings.pop("batch_size")
    with quiet():
        evaluate, wrap = cast(Any, simple_evaluate), cast(Any, HFLM)  # decorators hide their arguments
        found = evaluate(
            wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=[{"group": "all", "task": [local(task, folder) for task in tasks]}],
            task_manager=catalog().manager,
            **settings,
        )
    return json.loads(json.dumps({task: found["results"][task] for task in tasks}, default=float))
