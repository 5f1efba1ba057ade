"""Data sets with a recipe: where they are on the hub, how their rows are read, and which of them are held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lolcats.data.records import Record, to_record
from lolcats.data.templates import Template
from lolcats.errors import DataError


@dataclass(frozen=True)
class NamedSet:
    """A data set of the hub, and how it is used."""

    hub: str
    """Its name there."""
    template: Template
    validation: int | None = None
    """Its first records that are held out; None leaves the choice to `data.validation_sequences`."""
    limit: int | None = None
    """Records that are read; None reads all."""
    files: str | None = None
    """Raw .jsonl files that are read side by side; None leaves reading to the library datasets."""
    streaming: bool = False
    convert: Callable[[dict[str, Any], str], Record] = to_record


def _commonsense(row: dict[str, Any], where: str) -> Record:
    """A multiple-choice question as an instruction; the output is the right choice, letter and text."""
    try:
        letters, texts = row["choices"]["label"], row["choices"]["text"]
        question, answer = row["question"], texts[letters.index(row["answerKey"])]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{where}: expected "question", "choices" with "label" and "text", and "answerKey", got {row!r:.80}'
        ) from error
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    return {
        "instruction": "Answer the question by choosing one of the options.",
        "input": f"{question}\n{choices}",
        "output": f"{row['answerKey']}. {answer}",
    }


# Validation as in the LoLCATs paper: the first 200 samples of cleaned Alpaca, also where other data join it.
NAMED = {
    "alpaca-cleaned": NamedSet("yahma/alpaca-cleaned", "alpaca", validation=200),
    "commonsense-qa": NamedSet("tau/commonsense_qa", "alpaca", validation=0, limit=10_000, convert=_commonsense),
    "redpajama-sample": NamedSet(
        "togethercomputer/RedPajama-Data-1T-Sample", "plain", files="*_sample.jsonl", streaming=True
    ),
}
COLLECTIONS = {"alpaca-csqa": ("alpaca-cleaned", "commonsense-qa")}
NAMES = ("python-docs", *NAMED, *COLLECTIONS, "passkey", "self")
