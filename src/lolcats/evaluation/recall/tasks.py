"""The recall tasks by name: how their prompts are made, how long an answer may be, and how it is scored."""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from lolcats.data.passkey import DIGITS, passkey_sample
from lolcats.errors import DataError, LolcatsError
from lolcats.evaluation.recall.haystack import encode
from lolcats.evaluation.recall.needles import NeedleTask, Prompt, needle_prompt, tracking_prompt


def share_found(output: str, answers: Sequence[str]) -> float:
    """RULER's score: the share of the answers that stand somewhere in the output, in letters of any case."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def first_number(output: str, answers: Sequence[str]) -> float:
    """1.0 if the first number of the output is the answer, else 0.0."""
    found = re.search(r"\d+", output)
    return float(found is not None and found[0] == answers[0])


def _number_ended(output: str, answers: Sequence[str]) -> bool:
    return re.search(rf"\d\D|\d{{{len(answers[0]) + 1}}}", output) is not None


def _all_found(output: str, answers: Sequence[str]) -> bool:
    return share_found(output, answers) == 1


@dataclass(frozen=True)
class Request:
    """One prompt of a task."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    """Tokens of the prompt and the room for its answer."""
    depth: float
    rng: np.random.Generator
    essay: Sequence[str]
    """Sentences of prose; empty for tasks without."""


@dataclass(frozen=True)
class RecallTask:
    """A task.

    Attributes:
        about: what it asks, for people.
        write: makes a prompt.
        new_tokens: most tokens of an answer.
        score: of (output, answers), 0 to 1.
        settled: whether more output cannot change the score.
        by_depth: there is one needle, at the depth that was asked for.
        prose: the hay is prose.
    """

    about: str
    write: Callable[[Request], Prompt]
    new_tokens: int
    score: Callable[[str, Sequence[str]], float] = share_found
    settled: Callable[[str, Sequence[str]], bool] = _all_found
    by_depth: bool = True
    prose: bool = False


def _passkey(request: Request) -> Prompt:
    sample = passkey_sample(request.rng, request.tokenizer, request.length, request.depth)
    return Prompt(encode(request.tokenizer, sample.prompt), (sample.key,), (sample.depth,))


def _needle(task: NeedleTask, request: Request) -> Prompt:
    room = request.length - _NEEDLE_TOKENS
    return needle_prompt(task, request.tokenizer, room, request.depth, request.rng, request.essay)


def _tracking(request: Request) -> Prompt:
    return tracking_prompt(request.tokenizer, request.length - _TRACKING_TOKENS, request.rng)


def _needle_task(about: str, task: NeedleTask) -> RecallTask:
    return RecallTask(about, partial(_needle, task), _NEEDLE_TOKENS, by_depth=task.asked == 1, prose=task.prose)


_NEEDLE_TOKENS, _TRACKING_TOKENS = 128, 30  # RULER's
TASKS = {
    "passkey": RecallTask(
        f"a number of {DIGITS} digits in repeated noise", _passkey, DIGITS + 5, first_number, _number_ended
    ),
    "niah_single_1": _needle_task("a number under a key, in repeated noise", NeedleTask(prose=False)),
    "niah_single_2": _needle_task("a number under a key, in prose", NeedleTask()),
    "niah_single_3": _needle_task("a UUID under a key, in prose", NeedleTask(values="uuids")),
    "niah_multikey": _needle_task("one of four numbers under four keys, in prose", NeedleTask(distractors=3)),
    "niah_multiquery": _needle_task("all four numbers under four keys, in prose", NeedleTask(asked=4)),
    "vt": RecallTask("the five variables of a chain of assignments", _tracking, _TRACKING_TOKENS, by_depth=False),
}
"""In the order of the story; by name."""


def check_tasks(names: Sequence[str]) -> list[str]:
    """The names, each once, "all" written out.

    Raises:
        LolcatsError: a name that is no task, with the nearest one.
    """
    for name in names:
        if name not in TASKS and name != "all":
            near = max(TASKS, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
            known = ", ".join(TASKS)
            raise LolcatsError(f"unknown recall task {name!r}; did you mean {near}? There are {known}, or all")
    return list(TASKS) if "all" in names else list(dict.fromkeys(names))


def make_prompts(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    samples: int,
    depths: int,
    seed: int,
    essay: Sequence[str] = (),
) -> list[Prompt]:
    """Prompts of a task; each depends on its number, the settings and the seed alone.

    Args:
        name: of the task.
        tokenizer: of the model.
        length: tokens of the prompt and the room for its answer.
        samples: prompts; they are spread evenly over the depths, the first at the beginning of the text.
        depths: equal ranges of depth; inside its range a needle lies anywhere.
        seed: of keys, values and depths.
        essay: see `Request`.

    Raises:
        LolcatsError: the length has no room for the prompt.
    """
    prompts = []
    for index in range(samples):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), length, index])
        depth = (depth_range(index, samples, depths) + float(rng.random())) / depths
        try:
            prompts.append(TASKS[name].write(Request(tokenizer, length, depth, rng, essay)))
        except DataError as error:
            raise LolcatsError(f"{name} cannot be asked in {length} tokens: {error}") from error
    return prompts


def depth_range(index: int, samples: int, depths: int) -> int:
    """Which of the ranges of depth prompt `index` of `samples` belongs to."""
    return index * depths // samples
