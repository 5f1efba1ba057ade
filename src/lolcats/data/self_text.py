"""Text that the teacher writes, for users without data of their own.

A chat model is given the beginning of a user's turn and continues it with an instruction, then answers it (Magpie,
arXiv 2406.08464). A model without a chat template writes on from its begin token. Each batch has a random state of its
own and a file of its own, so an interrupted run goes on with the text that it would have written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig

from lolcats.data.records import Record
from lolcats.errors import DataError, LolcatsError
from lolcats.files import cache_root, write_text
from lolcats.identity import digest, tokenizer_identity
from lolcats.models.generation import own_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 32  # samples written at once
TOP_P = 0.95  # the least likely continuations are left out: they lead small models astray
INSTRUCTION_TOKENS = 256  # at most
FUTILE = 10  # batches without a usable sample after which it is given up
_MARK = "\u2063lolcats\u2063"  # stands for what the user says while the template around it is found out


class SelfText:
    """The samples of one teacher.

    Args:
        teacher: a causal language model.
        tokenizer: its tokenizer.
        count: samples.
        length: tokens of a sample, at most.
        seed: same seed, same text.
    """

    def __init__(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int
    ) -> None:
        self.teacher, self.tokenizer, self.count, self.length, self.seed = teacher, tokenizer, count, length, seed
        template = "chat" if tokenizer.chat_template else "plain"
        # Not the number of samples: asking for more goes on behind those that are there.
        self.key = {"self": 1, "teacher": fingerprint(teacher), "length": length, "seed": seed, "batch": BATCH}
        self.key["tokenizer"] = tokenizer_identity(tokenizer, template)
        self.folder = cache_root() / "self" / digest(self.key)

    @property
    def identity(self) -> dict[str, Any]:
        """What the text depends on."""
        return {**self.key, "count": self.count}

    def records(self) -> Iterator[Record]:
        """Instructions with answers ("prompt" and "completion"), or plain texts; none twice.

        Raises:
            DataError: the teacher writes nothing that can be used, or the cache cannot be written.
        """
        seen: set[str] = set()
        batch = futile = 0
        while len(seen) < self.count:
            fresh = [record for record in self._batch(batch) if _first(record) not in seen]
            batch, futile = batch + 1, 0 if fresh else futile + 1
            if futile == FUTILE:
                raise DataError(
                    f"the teacher wrote nothing new in {FUTILE} batches of {BATCH} samples ({len(seen)} are there); "
                    "lower the limit of the source self, or name other text"
                )
            for record in fresh:
                if _first(record) not in seen and len(seen) < self.count:
                    seen.add(_first(record))
                    yield record

    def _batch(self, number: int) -> list[Record]:
        """Batch `number`, from its file or from the teacher."""
        file = self.folder / f"{number:06}.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if _are_records(kept):
                return kept
        except (OSError, ValueError, RecursionError):
            pass
        records = self._write(number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(records) + "\n")
        except (OSError, LolcatsError) as error:
            raise DataError(f"cannot write the cache {self.folder}: {error}; set LOLCATS_CACHE=FOLDER") from error
        return records

    def _write(self, number: int) -> list[Record]:
        devices = [self.teacher.device] if self.teacher.device.type == "cuda" else []
        training = self.teacher.training
        self.teacher.eval()
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(int(digest([self.seed, number])[:15], 16))
                return self._converse() if self.tokenizer.chat_template else self._ramble()
        finally:
            self.teacher.train(training)

    def _ramble(self) -> list[Record]:
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        start = next((i for i in ends if isinstance(i, int)), None)
        if start is None:
            raise DataError("the tokenizer has neither a begin nor an end token, so the teacher cannot begin a text")
        texts = self._generate([[start]] * BATCH, self.length - 2, [])
        return [{"text": text} for text in texts if text.strip()]

    def _converse(self) -> list[Record]:
        before, _, after = self._template(_MARK, ask=False).partition(_MARK)
        after = after.strip()
        header = self._ids(before)
        closing = self._ids(after)[:1]
        special = [i for i in closing if i in self.tokenizer.all_special_ids]
        room = min(INSTRUCTION_TOKENS, self.length // 2)
        written = self._generate([header] * BATCH, room, special)
        # Where a turn ends with ordinary characters ("[/INST]"), they are found in the text.
        asked = [(text.split(after)[0] if after and not special else text).strip() for text in written]
        asked = [text for text in asked if text]
        if not asked:
            return []
        prompts = [self._ids(self._template(text, ask=True)) for text in asked]
        answers = self._generate(prompts, max(16, self.length - max(map(len, prompts)) - 1), [])
        pairs = zip(asked, answers, strict=True)
        return [{"prompt": text, "completion": answer.strip()} for text, answer in pairs if answer.strip()]

    def _template(self, text: str, ask: bool) -> str:
        turn = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=ask))

    def _ids(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _generate(self, prompts: Sequence[list[int]], tokens: int, stops: Sequence[int]) -> list[str]:
        """Sample a continuation of each prompt: its text up to the end token or one of `stops`."""
        own = self.teacher.generation_config.eos_token_id if self.teacher.generation_config else None
        known = [*stops, *(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id]
        ends = {token for token in known if isinstance(token, int)}
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.teacher.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=TOP_P, top_k=0, max_new_tokens=max(1, tokens),
            eos_token_id=sorted(ends) or None, pad_token_id=pad,
        )  # fmt: skip
        with own_settings(self.teacher, self.tokenizer, {}):  # what the teacher would like else is not asked for
            out: Any = self.teacher.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
        texts = []
        for row in out[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(str(self.tokenizer.decode(row[:end], skip_special_tokens=True)))
        return texts


def _are_records(kept: object) -> bool:
    """Whether this is what a batch is kept as: anything else is damage, and written again."""
    shapes = ({"text"}, {"prompt", "completion"})
    return isinstance(kept, list) and all(
        isinstance(record, dict) and set(record) in shapes and all(isinstance(text, str) for text in record.values())
        for record in kept
    )


def _first(record: Record) -> str:
    return record["text"] if "text" in record else record.get("prompt", "")


def fingerprint(model: PreTrainedModel) -> str:
    """A name for a model's weights: names, shapes, types and the first numbers of all of them."""
    value = hashlib.sha256()
    for name, parameter in model.named_parameters():
        value.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        first = parameter.detach().flatten()[:64].cpu()
        value.update(first.view(torch.uint8).numpy().tobytes())
    return value.hexdigest()[:20]
