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

from lolcats.data.passkey import DIGITS
from lolcats.errors import DataError, LolcatsError
from lolcats.evaluation.recall.needles import Prompt, Request, needle_prompt, passkey_prompt, tracking_prompt


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
class RecallTask:
    """A task."""

    write: Callable[[Request], Prompt]
    new_tokens: int
    """Most tokens of an answer."""
    score: Callable[[str, Sequence[str]], float] = share_found
    """Of (output, answers), 0 to 1."""
    settled: Callable[[str, Sequence[str]], bool] = _all_found
    """Whether more output cannot change the score."""
    by_depth: bool = True
    """There is one needle, at the depth that was asked for."""
    prose: bool = True
    """The hay is prose."""


_NEEDLE_TOKENS, _TRACKING_TOKENS = 128, 30  # RULER's
TASKS = {
    "passkey": RecallTask(passkey_prompt, DIGITS + 5, first_number, _number_ended, prose=False),
    "niah_single_1": RecallTask(needle_prompt, _NEEDLE_TOKENS, prose=False),
    "niah_single_2": RecallTask(needle_prompt, _NEEDLE_TOKENS),
    "niah_single_3": RecallTask(partial(needle_prompt, kind="uuids"), _NEEDLE_TOKENS),
    "niah_multikey": RecallTask(partial(needle_prompt, distractors=3), _NEEDLE_TOKENS),
    "niah_multiquery": RecallTask(partial(needle_prompt, asked=4), _NEEDLE_TOKENS, by_depth=False),
    "vt": RecallTask(tracking_prompt, _TRACKING_TOKENS, by_depth=False, prose=False),
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
        essay: sentences of prose, for tasks that hide needles in it.

    Raises:
        LolcatsError: the length has no room for the prompt.
    """
    task, prompts = TASKS[name], []
    for index in range(samples):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), length, index])
        depth = (depth_range(index, samples, depths) + float(rng.random())) / depths
        hay = essay if task.prose else ()
        try:
            prompts.append(task.write(Request(tokenizer, length - task.new_tokens, length, depth, rng, hay)))
        except DataError as error:
            raise LolcatsError(f"{name} cannot be asked in {length} tokens: {error}") from error
    return prompts


def depth_range(index: int, samples: int, depths: int) -> int:
    """Which of the ranges of depth prompt `index` of `samples` belongs to."""
    return index * depths // samples
