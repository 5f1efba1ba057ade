"""A model as lm-eval sees it: its own class for Hugging Face models, with answers that survive an interruption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.errors import LolcatsError
from lolcats.evaluation.store import AnswerStore
from lolcats.identity import key_of
from lolcats.placing import main_device

Base: Any = HFLM  # the decorator that registers it hides its type
PIECE = 16
"""Batches that are scored before their answers are kept."""
TokenRequest = tuple[Any, list[int], list[int]]
"""Texts (or None), tokens of the context, tokens of the continuation."""


class ResumableLM(Base):
    """HFLM that works through its requests in pieces and keeps the answers of each.

    The batches are those that HFLM makes of all requests at once, so the answers are the same to the last bit whether
    or not a run was interrupted.

    Args:
        model, tokenizer: loaded.
        batch_size: requests at once.
        store: where answers are kept.
        identity: of the model in its mode; part of every key.
        truncate: cut contexts that are too long for the model, at the left, instead of refusing them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        store: AnswerStore,
        identity: str,
        truncate: bool = False,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)  # type: ignore[arg-type]
        self._device = main_device(model)
        self._store = store
        self.identity = identity
        self._truncate = truncate
        self._show: Callable[[int, int | None], None] = lambda done, count: None
        self._done = 0
        self._count: int | None = 0
        self._task = ""
        self.truncated = 0
        """Requests of the task at work whose context was cut."""

    def begin(self, task: str, show: Callable[[int, int | None], None]) -> None:
        """From now on requests belong to `task`; `show` is called with (requests done, all or None if not known)."""
        self._task, self._show, self.truncated = task, show, 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM`."""
        self._start(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """See `lm_eval.api.model.LM`; long texts are cut into windows, which are what is counted."""
        self._start(None)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See `lm_eval.api.model.LM`."""
        self._start(len(requests))
        lengths = []
        for prompt, settings in (request.args for request in requests):
            room = normalize_gen_kwargs(dict(settings), self.max_gen_toks).get("max_gen_toks", 0)
            if room >= self.max_length:
                raise LolcatsError(
                    f"{self._task} asks for texts of {room:,} tokens and the model takes {self.max_length:,} in all"
                )
            lengths.append(len(self.tok_encode(prompt)) + room)
        self._check_lengths(lengths)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """HFLM's of a batch. Sampled texts are not kept: they are another draw each time."""
        compute = partial(super()._model_generate, context, max_length, stop, **options)
        if options.get("do_sample"):
            self._count_done(len(context))
            return compute()
        settings = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in options.items()}
        asked = [context.tolist(), max_length, stop, settings]
        return torch.tensor(self._kept(asked, len(context), lambda: compute().tolist()))

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answer = max((len(continuation) for _, _, continuation in requests), default=0)
        if answer > self.max_length:
            raise LolcatsError(f"{self._task}: an answer has {answer:,} tokens and the model takes {self.max_length:,}")
        self._check_lengths([len(context + continuation) - 1 for _, context, continuation in requests])
        shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            shared[tuple(context + continuation[:-1])].append(place)

        def order(places: list[int]) -> tuple[int, tuple[int, ...]]:
            """HFLM's: longest first; requests that differ in their last token alone share a forward pass."""
            _, context, continuation = requests[max(places, key=lambda place: len(requests[place][2]))]
            return -len(context + continuation), tuple(context + continuation)

        answers: list[Any] = [None] * len(requests)
        for groups in _pieces(sorted(shared.values(), key=order), PIECE * int(self.batch_size)):
            places = [place for group in groups for place in group]
            part = [[requests[place] for place in group] for group in groups]
            asked = [requests[place][1:] for place in places]
            found = self._kept(asked, len(asked), partial(self._score, part))
            for place, (score, greedy) in zip(places, found, strict=True):
                answers[place] = (score, greedy)
        return answers

    def _score(self, groups: list[list[TokenRequest]]) -> list[tuple[float, bool]]:
        """HFLM's numbers, without its four waits for the device a request and its softmax over all of the prompt.

        Args:
            groups: requests that are alike but for their last token.
        """
        return [answer for batch in _pieces(groups, int(self.batch_size)) for answer in self._score_batch(batch)]

    def _score_batch(self, groups: list[list[TokenRequest]]) -> list[tuple[float, bool]]:
        """One forward pass, with a row of tokens for each group: those of its requests without their last."""
        rows = [(of[0][1] + of[0][2][:-1])[-self.max_length :] for of in groups]
        longest = max(map(len, rows))
        inputs = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        # (row, position before, token) of every token of an answer
        answers = [(i, len(rows[i]), request[2]) for i, of in enumerate(groups) for request in of]
        asked = [(i, end - len(a) + j, t) for i, end, a in answers for j, t in enumerate(a)]
        row, position, token = torch.tensor(asked, device=self.device).unbind(1)
        logits = self._model_call(inputs)[row, position]
        scores = nnf.log_softmax(logits, -1, dtype=getattr(self, "softmax_dtype", None))
        values = scores.gather(1, token[:, None]).squeeze(1).cpu()
        greedy = (scores.argmax(-1) == token).cpu()
        sizes = [len(answer) for _, _, answer in answers]
        parts = zip(values.split(sizes), greedy.split(sizes), strict=True)
        return [(float(value.sum()), bool(equal.all())) for value, equal in parts]

    def _start(self, count: int | None) -> None:
        self._done, self._count = 0, count
        self._show(0, count)

    def _kept(self, asked: list[Any], count: int, compute: Callable[[], list[Any]]) -> list[Any]:
        """The answers to `count` requests: those of an earlier run, or computed now and kept."""
        key = key_of(self.identity, self.batch_size, self.max_length, asked)
        answers = self._store.get(key)
        if answers is None:
            answers = compute()
            self._store.put(key, answers)
        self._count_done(count)
        return answers

    def _count_done(self, count: int) -> None:
        self._done += count
        self._show(self._done, self._count)

    def _check_lengths(self, lengths: list[int]) -> None:
        """HFLM drops the start of a prompt that does not fit with its answer, and goes on; that is said, or refused."""
        over = sum(length > self.max_length for length in lengths)
        if over and not self._truncate:
            raise LolcatsError(
                f"{self._task}: {over:,} of {len(lengths):,} prompts are too long, the longest with {max(lengths):,} "
                f"tokens where the model takes {self.max_length:,}; use fewer examples, or cut them at the left as "
                "lm-eval does",
                hint="truncate",
            )
        self.truncated += over


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> None:
    """Refuse a tokenizer that does not belong to the model, or that lacks what the tasks need.

    Raises:
        LolcatsError: it has tokens that the model does not know, no token to begin a text with, or no chat template.
    """
    known = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    largest = max(tokenizer.get_vocab().values())
    if largest >= known:
        raise LolcatsError(
            f"the tokenizer has tokens up to number {largest:,} and the model knows {known:,}; expected the tokenizer "
            "that the model was trained with"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise LolcatsError("the tokenizer names no token that begins or ends a text (bos_token, eos_token); set one")
    if chat and not tokenizer.chat_template:
        raise LolcatsError("the tokenizer has no chat template, which chat=True needs; leave it out", hint="chat")


def _pieces(items: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
