"""The loop that writes: texts on their way, in the rows of a pool."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lolcats.models.generation import NOT_FINITE, end_tokens
from lolcats.serving.choosing import NOT_A_NUMBER, Draw, choose
from lolcats.serving.pool import Pool, Prompts
from lolcats.serving.requests import Request

TOGETHER = 8
"""Prompts that are read at once: they cost little more time than one, and wait in memory for their rows."""


@dataclass(frozen=True)
class Answer:
    """What became of a row."""

    index: int
    """Of the row, from 0."""
    id: Any
    """The row's own, None without."""
    text: str | None
    """What the model wrote, without the prompt, the token that ended it, or the text at which it was to stop."""
    prompt_tokens: int
    new_tokens: int
    """All that were made, also those that are not in the text."""
    finish_reason: str
    """"stop": by a token that ends texts, or a text of `stop`; "length": `max_new_tokens` are there; "error"."""
    error: str | None = None
    metadata: Any = None
    """The row's own."""


class Writing:
    """A text on its way.

    Args:
        request: what is asked.
        tokenizer: of the model.
        ends: tokens that end a text.
    """

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
        self.request, self.tokenizer, self.ends = request, tokenizer, ends
        self.tokens: list[int] = []
        self._random = random.Random(request.seed)
        longest = max((len(text.encode()) for text in request.stop), default=0)
        self._tail = longest + 8  # a token is a byte or more, but for special ones and parts of a character

    def draw(self) -> Draw:
        """How the next token is to be chosen."""
        if self.request.temperature == 0:
            return Draw()
        return Draw(self.request.temperature, self.request.top_p, self._random.random())

    def take(self, token: int) -> Answer | None:
        """Add a token; the answer, where it was the last."""
        if token == NOT_A_NUMBER:
            return self._end("error", None, NOT_FINITE)
        self.tokens.append(token)
        if token in self.ends:
            return self._end("stop", self._decode(self.tokens[:-1]))
        if self.request.stop and self._stops(self._decode(self.tokens[-self._tail :])) is not None:
            text = self._decode(self.tokens)
            if (end := self._stops(text)) is not None:
                return self._end("stop", text[:end])
        if len(self.tokens) == self.request.max_new_tokens:
            return self._end("length", self._decode(self.tokens))
        return None

    def _stops(self, text: str) -> int | None:
        """Where the first text of `stop` begins."""
        return min((place for stop in self.request.stop if (place := text.find(stop)) >= 0), default=None)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _end(self, reason: str, text: str | None, error: str | None = None) -> Answer:
        asked = self.request
        return Answer(
            asked.index, asked.id, text, asked.prompt_tokens, len(self.tokens), reason, error, asked.metadata
        )  # fmt: skip


class Writer:
    """Writes what is asked, as many texts at once as the pool has rows.

    Args:
        pool: without texts.
        tokenizer: of its model.
        done: indices of requests whose answers are known.
    """

    def __init__(self, pool: Pool, tokenizer: PreTrainedTokenizerBase, done: frozenset[int]) -> None:
        self.pool, self.tokenizer, self.done = pool, tokenizer, done
        self.ends = frozenset(end_tokens(pool.model))
        self.texts: list[Writing | None] = [None] * pool.rows
        self.ready: deque[tuple[Writing, Prompts, int]] = deque()
        """Texts that have their first token and wait for a row."""

    @torch.no_grad()
    def write(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Answer]]]:
        """After each call of the model: how many tokens it made, and the answers that are complete with them."""
        together = min(TOGETHER, self.pool.rows)
        groups = deque(g for g in group(requests, together, self.pool.chunk) if not self.done.issuperset(indices(g)))
        while True:
            while None in self.texts and (groups or self.ready):
                if self.ready:
                    row = self.texts.index(None)
                    self.texts[row], prompts, place = self.ready.popleft()
                    self.pool.put(row, prompts, place)
                else:
                    yield self._read(groups.popleft())
            if not any(self.texts):
                return
            yield self._step()

    def _read(self, requests: Sequence[Request]) -> tuple[int, list[Answer]]:
        """Read the prompts of a group, answered ones too: how many there are changes how the others are rounded."""
        texts = [Writing(request, self.tokenizer, self.ends) for request in requests]
        prompts = self.pool.read([request.ids for request in requests if request.ids is not None])
        tokens = self._choose(prompts.logits, texts)
        new = [place for place, text in enumerate(texts) if text.request.index not in self.done]
        answers = {place: texts[place].take(tokens[place]) for place in new}
        self.ready.extend((texts[place], prompts, place) for place in new if answers[place] is None)
        return len(new), [answer for answer in answers.values() if answer is not None]

    def _step(self) -> tuple[int, list[Answer]]:
        logits = self.pool.step([None if text is None else text.tokens[-1] for text in self.texts])
        tokens = self._choose(logits, self.texts)
        made, answers = 0, []
        for row, text in enumerate(self.texts):
            if text is not None:
                made += 1
                if (answer := text.take(tokens[row])) is not None:
                    answers.append(answer)
                    self.texts[row] = None
        return made, answers

    @staticmethod
    def _choose(logits: torch.Tensor, texts: Sequence[Writing | None]) -> list[int]:
        return choose(logits, [Draw() if text is None else text.draw() for text in texts])


def group(requests: Sequence[Request], most: int, tokens: int) -> Iterator[list[Request]]:
    """Requests in their order, in groups whose prompts are read together.

    Args:
        requests: each with its tokens.
        most: of them in a group.
        tokens: of a group, padding counted, of which there is no more than of text; a longer prompt is alone.
    """
    found: list[Request] = []
    for request in requests:
        lengths = [other.prompt_tokens for other in (*found, request)]
        padded = len(lengths) * max(lengths)
        if found and (len(lengths) > most or padded > min(tokens, 2 * sum(lengths))):
            yield found
            found = []
        found.append(request)
    if found:
        yield found


def indices(requests: Sequence[Request]) -> set[int]:
    """Of the rows of a file."""
    return {request.index for request in requests}
