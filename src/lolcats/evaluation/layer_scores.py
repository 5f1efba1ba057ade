"""Which layers should keep softmax attention: what a model loses where single layers do without it.

| score   | a layer matters                                                                              |
|---------|----------------------------------------------------------------------------------------------|
| kl      | the more the predictions change, KL(teacher || model), where it alone is replaced            |
| kl_rest | the less they have changed where all layers but it are replaced                              |
| halo    | the more recall is lost for what is lost elsewhere, where it alone is replaced                |

`halo` is the score of arXiv 2601.22156 in the form of its authors' code (github.com/thunlp/hybrid-linear-attention),
with what can be told in a few forward passes in the place of benchmarks:

    min(50, (max_j R_j - R_i) / (max_j C_j - C_i + 1e-10))

R_i is the mean log-probability of the tokens of passkeys, read and asked for in filler, and C_i that of the tokens of
text, in nats, where layer i alone is replaced; there they are shares of right answers in recall and common sense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.errors import LolcatsError
from lolcats.evaluation.perplexity import Measurement, Variant, measure
from lolcats.evaluation.recall.tasks import make_prompts
from lolcats.modeling.attention import SOFTMAX
from lolcats.modeling.replay import LayerModes

Score = Literal["kl", "kl_rest", "halo"]
SCORES: tuple[Score, ...] = get_args(Score)
LARGEST, TINY = 50.0, 1e-10
"""The bound of `halo`, and what keeps its denominator from 0."""


@dataclass
class LayerScore:
    """What is known of one layer."""

    layer: int
    score: float
    """Of the kind that was asked for; the layers of the highest should keep softmax."""
    kl: float
    """KL(teacher || model) on the text, nats a token: with this layer replaced, or for `kl_rest` with all others."""
    loss: float
    """The same model's on the text, nats a token."""
    recall: float | None = None
    """Mean log-probability of a passkey's tokens, nats; None where it was not asked for."""

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)


def score_layers(
    model: PreTrainedModel,
    segments: Tensor,
    score: Score = "kl",
    *,
    mode: str = "equal_window",
    questions: Sequence[Tensor] = (),
    answer_tokens: int = 1,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerScore]:
    """Score the linearized layers of a converted teacher, the most important first.

    Args:
        model: with the teacher's weights.
        segments: [S, N] tokens of text.
        score: see above.
        mode: of a layer that is replaced: "equal_window", or "full", the layer itself as conversion started it.
        questions: for `halo`, texts [N] whose last tokens are answers; see `passkeys`.
        answer_tokens: how many.
        batch_size: segments at once.
        progress: called with (parts of the work done, all).

    Raises:
        ValueError: an unknown score, or `halo` without questions.
        LolcatsError: fewer than two layers, between which nothing could be chosen.
    """
    if score not in SCORES or (score == "halo" and not questions):
        raise ValueError(f"expected one of {', '.join(SCORES)}, halo with questions; got {score!r}")
    modes = LayerModes(model)
    if len(modes.layers) < 2:
        raise LolcatsError(
            f"{type(model).__name__} has {len(modes.layers)} layers to choose from; expected two or more"
        )
    variants, teacher = _variants(modes, mode, alone=score != "kl_rest")
    parts = [segments[begin : begin + batch_size] for begin in range(0, len(segments), batch_size)]
    count = len(parts) + len(questions)

    def all_of(texts: Sequence[Tensor], last: int | None, done: int) -> dict[str, list[Measurement]]:
        found: dict[str, list[Measurement]] = {name: [] for name in variants}
        for number, text in enumerate(texts, start=1):
            scores = measure(variants, text, teacher=teacher, last=last, batch_size=len(text))
            for name in variants:
                found[name].append(scores[name])
            if progress is not None:
                progress(done + number, count)
        return found

    text = all_of(parts, None, 0)
    recall = all_of([question[None] for question in questions], answer_tokens, len(parts)) if score == "halo" else {}
    found = [_layer_score(index, text[str(index)], recall.get(str(index))) for index in modes.layers]
    _rank(found, score)
    return sorted(found, key=lambda item: (-item.score, item.recall or 0.0, item.layer))


def passkeys(tokenizer: PreTrainedTokenizerBase, length: int, samples: int, seed: int = 0) -> tuple[list[Tensor], int]:
    """Prompts of the task passkey with their answers, and how many tokens of each end count.

    Args:
        tokenizer: of the model.
        length: tokens of prompt and answer, at most.
        samples: prompts, spread evenly over the depths.
        seed: of keys and depths.

    Raises:
        LolcatsError: a length without room for the prompt.
    """
    prompts = make_prompts("passkey", tokenizer, length, samples=samples, depths=samples, seed=seed)
    answers = [tokenizer(f" {p.answers[0]}", add_special_tokens=False)["input_ids"] for p in prompts]
    texts = [torch.tensor([*p.ids, *answer]) for p, answer in zip(prompts, answers, strict=True)]
    return texts, min(map(len, answers))


def split_layers(scores: Sequence[LayerScore], keep: float) -> tuple[list[int], list[int]]:
    """The layers that keep softmax, a share `keep` of all, and the others, in order; at least one of either kind."""
    count = min(len(scores) - 1, max(1, round(keep * len(scores))))
    return sorted(item.layer for item in scores[:count]), sorted(item.layer for item in scores[count:])


def _variants(modes: LayerModes, mode: str, alone: bool) -> tuple[dict[str, Variant], Variant]:
    """Each layer by itself, or all but it, by the layer's index; and the teacher.

    What each starts from is measured before it: the teacher, or the model with all layers replaced.
    """
    softmax, replaced = (dict.fromkeys(modes.layers, name) for name in (SOFTMAX, mode))
    teacher = Variant(modes.model, partial(modes.record, SOFTMAX, softmax))
    start, base, other = (SOFTMAX, softmax, mode) if alone else (mode, replaced, SOFTMAX)
    found = {} if alone else {"all": Variant(modes.model, partial(modes.record, mode, replaced))}
    for index in modes.layers:
        found[str(index)] = Variant(modes.model, partial(modes.replay, start, base | {index: other}, index))
    return found, teacher


def _layer_score(layer: int, text: Sequence[Measurement], recall: Sequence[Measurement] | None) -> LayerScore:
    tokens = sum(part.tokens for part in text)
    loss = sum(part.loss * part.tokens for part in text) / tokens
    kl = sum((part.kl or 0.0) * part.tokens for part in text) / tokens
    return LayerScore(
        layer, 0.0, kl, loss, None if recall is None else -sum(part.loss for part in recall) / len(recall)
    )


def _rank(found: Sequence[LayerScore], score: Score) -> None:
    """Put in the scores."""
    if score == "halo":
        values = halo([item.recall or 0.0 for item in found], [-item.loss for item in found])
    else:
        values = [item.kl if score == "kl" else -item.kl for item in found]
    for item, value in zip(found, values, strict=True):
        item.score = value


def halo(recall: Sequence[float], other: Sequence[float]) -> list[float]:
    """The score of the module's docstring, from R and C of each layer."""
    most, best = max(recall), max(other)
    return [min(LARGEST, (most - r) / (best - c + TINY)) for r, c in zip(recall, other, strict=True)]
