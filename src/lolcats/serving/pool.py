"""Texts that are written side by side: each has a row of one cache, and a row that is done gets another text.

Rows differ in length. Where all layers are linearized no mask says so: what a layer keeps of a text has one size, its
state knows how many tokens it stands for, and positions are given for each row. So every step is the same call with the
same shapes. Layers with softmax attention keep keys and values, whose rows are padded on the left, and need a mask.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lolcats.errors import LolcatsError
from lolcats.mixers.state import put_rows
from lolcats.modeling.cache import LinearizedLayer
from lolcats.modeling.head import relative_error, tolerance
from lolcats.modeling.saved_state import EMPTY, SOFTMAX
from lolcats.ops.types import map_state
from lolcats.placing import main_device

PROBE = 4
"""Tokens of a text by which a model is asked how it counts."""


class Prompts(NamedTuple):
    """Prompts that were read together, and wait for rows."""

    cache: DynamicCache
    lengths: list[int]
    logits: Tensor
    """[prompts, V]: predictions of the next token of each."""


class Pool:
    """Rows for texts.

    Args:
        model: what reads and writes.
        rows: how many texts at once.
        chunk: tokens of a prompt that are read at a time, which bounds the memory for long ones.
    """

    def __init__(self, model: PreTrainedModel, rows: int, chunk: int) -> None:
        self.model, self.rows, self.chunk = model, rows, chunk
        self.lengths = [0] * rows
        """Tokens that the cache holds of each row."""
        self.cache: DynamicCache | None = None
        self.padded = False
        """Whether it has layers whose rows are padded."""
        self._known = inspect.signature(model.forward).parameters

    def read(self, texts: Sequence[Tensor]) -> Prompts:
        """Read prompts [1, N], padded to the longest, which is read in pieces only where it is alone.

        Raises:
            LolcatsError: there are several rows, and the model takes no positions of each, or keeps something of a text
                that cannot be put into one.
        """
        if self.rows > 1 and self.cache is None:
            self._check_positions(texts[0][:, :PROBE])
        lengths = [text.shape[1] for text in texts]
        longest, device = max(lengths), main_device(self.model)
        assert len(texts) == 1 or len(texts) * longest <= self.chunk, lengths
        ids = torch.cat([torch.nn.functional.pad(text, (longest - text.shape[1], 0)) for text in texts]).to(device)
        places = torch.arange(longest, device=device) - (longest - torch.tensor(lengths, device=device))[:, None]
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._known else {}
        if min(lengths) < longest:
            options["attention_mask"] = (places >= 0).long()
        cache, logits = DynamicCache(config=self.model.config), None
        for start in range(0, longest, self.chunk):
            part = slice(start, start + self.chunk)
            logits = self._forward(ids[:, part], cache, places[:, part].clamp_min(0), **options)
        assert logits is not None, "a prompt has a token"
        if self.rows > 1:
            _check_layers(cache)
        return Prompts(cache, lengths, logits)

    def _check_positions(self, ids: Tensor) -> None:
        """Refuse models that do not count a text's positions as we do: from 0, and as they are told."""
        ids = ids.to(main_device(self.model))
        given = {"position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}
        if "position_ids" in self._known:
            told, own = (cast(Any, self.model)(input_ids=ids, use_cache=False, **x).logits for x in (given, {}))
            if not own.isfinite().all() or relative_error(told, own) <= tolerance(own.dtype):  # NaN is the row's to say
                return
        raise LolcatsError(
            f"{type(self.model).__name__} has positions of its own that cannot be given (position_ids), so texts of "
            "different lengths cannot be written side by side; take a batch size of 1",
            hint="batch_size",
        )

    def put(self, row: int, prompts: Prompts, place: int) -> None:
        """Give a row to one of the prompts that were read, whatever was there before."""
        length = prompts.lengths[place]
        if self.cache is None or self.rows == 1:
            self.cache = prompts.cache if self.rows == 1 else _repeated(prompts, place, self.rows)
            self.lengths = [length] * self.rows
            self.padded = self.rows > 1 and any(isinstance(layer, DynamicLayer) for layer in self.cache.layers)
        self.lengths[row] = length
        if self.rows > 1:
            width = max(self.lengths)
            for held, new in zip(self.cache.layers, prompts.cache.layers, strict=True):
                if isinstance(held, LinearizedLayer):
                    put_rows(held.state, _row(new, place), _slot(held, row))
                    held.seen = width
                elif isinstance(held, DynamicLayer):
                    _put_keys(held, cast(DynamicLayer, new), row, place, length, width)

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """One more token of each text; None in a row without one, which computes what nobody looks at.

        Returns:
            Predictions [rows, V] of the next ones.
        """
        positions = [0 if token is None else length for token, length in zip(tokens, self.lengths, strict=True)]
        both = torch.tensor([[token or 0 for token in tokens], positions], device=main_device(self.model))
        mask = {"attention_mask": self._mask()} if self.padded else {}
        self.lengths = [length + 1 for length in self.lengths]
        return self._forward(both[0, :, None], cast(DynamicCache, self.cache), both[1, :, None], **mask)

    def _mask(self) -> Tensor:
        """[rows, columns] of the tokens that the cache holds and a new one: a text is at the right."""
        column = torch.arange(max(self.lengths) + 1, device=main_device(self.model))
        first = column[-1] - torch.tensor(self.lengths, device=main_device(self.model))
        return (column >= first[:, None]).long()

    def _forward(self, ids: Tensor, cache: DynamicCache, position_ids: Tensor, **others: Any) -> Tensor:
        if self.rows > 1:  # else the model counts for itself
            others["position_ids"] = position_ids
        return cast(Any, self.model)(input_ids=ids, past_key_values=cache, use_cache=True, **others).logits[:, -1]


def _check_layers(cache: DynamicCache) -> None:
    """Refuse caches whose rows cannot change their texts."""
    for index, layer in enumerate(cache.layers):
        kind = type(layer).__name__
        if not isinstance(layer, LinearizedLayer) and kind not in (EMPTY, *SOFTMAX):
            raise LolcatsError(
                f"layer {index} of the model keeps its texts in a {kind}, in which one text cannot be put in the place "
                "of another; take a batch size of 1, which writes the texts one after the other",
                hint="batch_size",
            )


def _repeated(prompts: Prompts, place: int, rows: int) -> DynamicCache:
    """A cache whose rows all hold one of the prompts: rows that have no text yet must hold something."""
    pool = DynamicCache()
    for layer in prompts.cache.layers:
        held: Any = copy.copy(layer)
        if isinstance(layer, LinearizedLayer):
            held = LinearizedLayer()
            state = map_state(_row(layer, place), lambda t: t.repeat_interleave(rows, 0))
            held.advance(state, prompts.lengths[place])  # nothing of it was padding
        elif isinstance(layer, DynamicLayer):
            held.keys, held.values = (
                cast(Tensor, x)[place].expand(rows, -1, -1, -1) for x in (layer.keys, layer.values)
            )
        pool.layers.append(held)
    return pool


def _row(layer: Any, place: int) -> Any:
    return map_state(layer.state, lambda t: t[place : place + 1])


def _slot(layer: LinearizedLayer, row: int) -> Tensor:
    assert layer.state is not None
    return torch.tensor([row], device=layer.state.length.device)


def _put_keys(held: Any, new: DynamicLayer, row: int, place: int, length: int, width: int) -> None:
    """Write the keys and values of a text over a row, of `width` columns then or of the last that a window shows."""
    columns = min(width, held.sliding_window - 1) if held.is_sliding else width
    own = min(length, columns)
    for name in ("keys", "values"):
        before, text = getattr(held, name), getattr(new, name)
        after = torch.nn.functional.pad(before, (0, 0, columns - before.shape[2], 0)).clone()  # less than none: cut off
        after[row] = 0
        after[row, :, columns - own :] = text[place, :, text.shape[2] - own :]
        setattr(held, name, after)
    if held.is_sliding:
        held.cumulative_length = width
