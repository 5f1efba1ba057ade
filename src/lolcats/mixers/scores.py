"""Scores of keys: which pairs a layer keeps when they leave its window.

| name        | score of a key                                                                                     |
|-------------|----------------------------------------------------------------------------------------------------|
| learned     | a guess of the attention that later queries will give it, from the layer's input, the key, the value |
| self_recall | how badly the far half recalls its value (LoLA, arXiv 2505.23666)                                    |
| recency     | its position: the window, made longer (control)                                                     |
| random      | chance, the same for the same position (control)                                                    |
| oracle      | the attention that later queries do give it (evaluation of whole texts only: the ceiling)            |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.mixers.base import Call, Sizes
from lolcats.mixers.softmax import attention_blocks
from lolcats.ops.devices import without_autocast
from lolcats.ops.near.given import head_windows, kernel_given
from lolcats.ops.near.prepare import score_keys, score_refusal
from lolcats.ops.near.prepared import ScoreCall, ScoreWeights

SCORES = ("learned", "self_recall", "recency", "random", "oracle")
HIDDEN_WIDTH, PAIR_WIDTH = 128, 64
"""Of the two parts of the learned score."""
SMALLEST = 1e-4
"""Added to an attention weight before its logarithm is taken."""
RESOLUTION = 1024
"""Scores that are computed are multiples of one part in so many."""
UNJUDGED = 256
"""The last keys of a text have few queries after them, so nothing is learned from them."""
QUERY_BLOCK = 512
"""Queries whose attention is in memory at once."""

Window = int | tuple[int, ...]
"""Tokens of the window of all key heads, or of each."""


class LearnedScore(nn.Module):
    """Two numbers for each key: log of the largest and log of the summed far attention that it will be given.

    Args:
        sizes: of what arrives at the layer.
        reads_error: whether it reads, beside input, key and value, how badly the far half recalls the value.
    """

    def __init__(self, sizes: Sizes, reads_error: bool) -> None:
        super().__init__()
        self.kv_heads, self.reads_error = sizes.kv_heads, reads_error
        self.read_hidden = nn.Linear(sizes.hidden_size, HIDDEN_WIDTH, dtype=torch.float32)
        pair = sizes.head_dim + sizes.value_dim + int(reads_error)
        self.read_pair = nn.Linear(pair, PAIR_WIDTH, dtype=torch.float32)
        self.from_hidden = nn.Linear(HIDDEN_WIDTH, 2 * sizes.kv_heads, dtype=torch.float32)
        self.from_pair = nn.Linear(PAIR_WIDTH, 2, bias=False, dtype=torch.float32)

    def forward(self, hidden: Tensor, k: Tensor, v: Tensor, error: Tensor | None) -> Tensor:
        """Both numbers [B, KV, N, 2].

        Args:
            hidden: the layer's input [B, N, d_model].
            k: [B, KV, N, D], before their rotation; v: [B, KV, N, Dv].
            error: log of the error [B, KV, N] of recalling v, where it is read.
        """
        with without_autocast(hidden.device.type):
            dtype, from_hidden = self.read_hidden.weight.dtype, self.of_hidden(hidden)
            pair = [k.to(dtype), v.to(dtype)]
            if error is not None:
                pair.append(error[..., None].to(dtype))
            from_pair = self.from_pair(nnf.gelu(self.read_pair(torch.cat(pair, -1))))
            return from_hidden.unflatten(-1, (self.kv_heads, 2)).transpose(1, 2) + from_pair

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """What the layer's input [B, N, d_model] says of each key head, [B, N, 2 KV]."""
        with without_autocast(hidden.device.type):
            normed = nnf.layer_norm(hidden.to(self.read_hidden.weight.dtype), hidden.shape[-1:])
            return self.from_hidden(nnf.gelu(self.read_hidden(normed)))

    def weights(self) -> ScoreWeights:
        """For a kernel."""
        first, pair, last = self.read_hidden, self.read_pair, self.from_hidden
        return ScoreWeights(
            first.weight, first.bias, pair.weight, pair.bias, last.weight, last.bias, self.from_pair.weight
        )


class KeyScores(nn.Module):
    """The score of a layer's keys.

    Args:
        sizes: of what arrives at the layer.
        name: a name of the table.
        mix: of "learned" and "oracle": weight of the largest attention, 0 to 1; the rest is the sum's.
        fade: tokens after which a score has fallen by 1 against those of newer keys, or None.
        recall_error: of "learned": whether it reads the error of the far half.
    """

    def __init__(self, sizes: Sizes, name: str, mix: float, fade: int | None, recall_error: bool) -> None:
        super().__init__()
        self.sizes, self.name, self.mix, self.fade = sizes, name, mix, fade
        self.network = LearnedScore(sizes, recall_error) if name == "learned" else None

    def forward(
        self, call: Call, k: Tensor, position: Tensor, window: Window, recall: Callable[[], Tensor]
    ) -> Tensor:  # fmt: skip
        """The score [B, KV, N] of each key of a call.

        Args:
            call: the tokens; a text in each row.
            k: [B, KV, N, D], keys before their rotation.
            position: [B, N], of the tokens in their text.
            window: of the layer, or of each of its key heads.
            recall: makes the error [B, KV, N] of the far half.
        """
        score = self._fresh(call, k, position, window, recall)
        if self.name not in ("recency", "random"):
            # A word that comes again has the same score in the first layer, but for how products are added up, which
            # differs between a text and a step: then the order of positions decides, not the last digit.
            score = (score * RESOLUTION).round() / RESOLUTION
        return self.faded(score, position)

    def faded(self, score: Tensor, position: Tensor) -> Tensor:
        """The score [B, KV, N] of keys at these positions [B, N], from what it is before it fades."""
        # What fades does so at one rate, so it is the same to let what comes later start higher.
        return score if self.fade is None else score + (position / self.fade)[:, None]

    def told(self, call: Call, rotated: bool) -> ScoreCall | None:
        """What a kernel needs to make the score of a decoding step; None where it is not a learned one, or recalls.

        Args:
            call: one token of each text.
            rotated: whether the score reads keys as they are after their rotation.
        """
        if self.network is None or self.network.reads_error:
            return None
        turn = None if rotated else call.rotation
        score = ScoreCall(call.hidden, self.network.weights(), self.mix, self.fade, RESOLUTION)
        return score if turn is None else score._replace(cos=turn.cos, sin=turn.sin, layout=turn.layout)

    @torch.no_grad()
    @torch.no_grad()
    def by_kernel(self, call: Call, rotated: bool, impl: str) -> Tensor | None:
        """The score [B, KV, N] of each key before it fades; None where no kernel makes it.

        In training too: a choice of pairs has no gradient, and what a score learns from is `side_loss`.

        Args:
            call: as it comes, with the rotation of its keys.
            rotated: whether the score reads keys as they are after their rotation.
            impl: of near attention.
        """
        if torch.compiler.is_compiling() or (impl != "triton" and (impl != "auto" or not call.k.is_cuda)):
            return None
        told = self.told(call, rotated)
        if told is None or score_refusal(call.k, call.v, told) is not None:
            return None
        return score_keys(call.k, call.v, told)

    def _fresh(self, call: Call, k: Tensor, position: Tensor, window: Window, recall: Callable[[], Tensor]) -> Tensor:
        if self.network is not None:
            return self._mixed(self.network(call.hidden, k, call.v, self._error(recall)))
        if self.name == "self_recall":
            return _log_error(recall)
        if self.name == "random":
            return chance(position, k.shape[1])
        if self.name == "oracle":
            if bool((position[:, 0] > 0).any()):
                raise LolcatsError(
                    "kept.score: oracle looks at the rest of the text, so it is for measuring whole texts at once; "
                    "choose another score to generate"
                )
            return self._mixed(attention_given(call, window))
        return position[:, None].expand(-1, k.shape[1], -1).double()

    def _mixed(self, numbers: Tensor) -> Tensor:
        """One score of the logs of the largest and of the summed attention, [B, KV, N, 2]."""
        largest, summed = numbers.unbind(-1)
        return self.mix * largest + (1 - self.mix) * summed

    def _error(self, recall: Callable[[], Tensor]) -> Tensor | None:
        """What the network reads of the far half; the far half learns nothing by it."""
        reads = self.network is not None and self.network.reads_error
        return _log_error(recall).detach() if reads else None

    def loss(self, call: Call, k: Tensor, window: Window, recall: Callable[[], Tensor]) -> Tensor | None:
        """Mean squared error of a learned score on whole texts, against the teacher's attention; None of another."""
        if self.network is None:
            return None
        given = attention_given(call, window)
        judged = max(1, given.shape[2] - UNJUDGED)
        error = self.network(call.hidden, k, call.v, self._error(recall)) - given
        return error[:, :, :judged].square().mean()


def _log_error(recall: Callable[[], Tensor]) -> Tensor:
    return recall().clamp_min(1e-9).log()


@torch.no_grad()
def attention_given(call: Call, window: Window) -> Tensor:
    """Logs of the largest and the summed weight that queries `window` or more tokens later give each key.

    By Triton kernels where these can run, whose products are not rounded; else as `attention_given_beyond`.

    Args:
        call: whole texts, a row each.
        window: tokens within which attention does not count, of all key heads or of each.

    Returns:
        [B, KV, N, 2] float32: the largest over the queries and query heads, and the sum over queries, mean over heads.
    """
    given = None
    if call.padding is None and call.segments is None:
        q, k = call.q.to(call.v.dtype), call.k.to(call.v.dtype)  # as near attention reads them
        given = kernel_given(
            q, k, window, scale=call.scale, softcap=call.softcap, sink_logits=call.sink_logits, least=SMALLEST
        )
    return attention_given_beyond(call, [window])[0] if given is None else given


@torch.no_grad()
def attention_given_beyond(call: Call, windows: Sequence[Window]) -> list[Tensor]:
    """`attention_given` for each of several windows, in hardly more time than for one."""
    batch, kv_heads, n, _ = call.k.shape
    found = [torch.zeros(2, batch, kv_heads, n, device=call.q.device) for _ in windows]
    keys = torch.arange(n, device=call.q.device)
    for begin, weights in attention_blocks(call, QUERY_BLOCK):
        end = weights.shape[-1]
        queries = keys[begin:end, None]
        weights = weights.unflatten(1, (kv_heads, -1))
        whole = _largest_and_sum(weights)
        for (largest, summed), window in zip(found, windows, strict=True):
            widest, narrowest = (window, window) if isinstance(window, int) else (max(window), min(window))
            # Keys before `sure` are far from all queries of the block, and those from `last` on from none.
            sure, last = max(0, begin - widest + 1), max(0, end - narrowest)
            far = weights[..., sure:last] * _is_far(queries - keys[sure:last], window, call.k)
            for total, new, add in zip(
                (largest, summed), _largest_and_sum(far), (torch.maximum, torch.add), strict=True
            ):
                total[..., sure:last] = add(total[..., sure:last], new)
            largest[..., :sure] = torch.maximum(largest[..., :sure], whole[0][..., :sure])
            summed[..., :sure] += whole[1][..., :sure]
    return [(given.movedim(0, -1) + SMALLEST).log() for given in found]


def _is_far(distance: Tensor, window: Window, k: Tensor) -> Tensor:
    """Whether queries are far from keys, by their distance [C, K]: [C, K], or [KV, 1, C, K] where windows differ."""
    if isinstance(window, int):
        return distance >= window
    return distance >= head_windows(window, k)[:, None, None, None]


def _largest_and_sum(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of weights [B, KV, G, C, K] over queries, and over query heads the largest and the mean: [B, KV, K] each."""
    return weights.amax((2, 3)), weights.sum(3).mean(2)


def chance(position: Tensor, kv_heads: int) -> Tensor:
    """A number in [0, 1) for each position [B, N] and key head, always the same one: [B, KV, N]."""
    head = torch.arange(1, kv_heads + 1, device=position.device)[:, None]
    return ((position[:, None].double() * 12.9898 + head * 78.233).sin() * 43758.5453).remainder(1.0)
