"""Compile what prepares a decoding step as `compile_near.py` does its kernels: python compile_prepare.py DTYPE SIZE.

Other numbers of texts, and of tokens before them, take the same ones.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compile_near import Compiler  # puts the package there

from lolcats.ops.near.head_sizes import Ends, head_sizes
from lolcats.ops.near.kernels import collect, hidden, pairs, prepare, score
from lolcats.ops.near.prepared import ScoreCall, ScoreWeights, SinkCall
from lolcats.ops.near.quantize import PairCodec, plain_map
from lolcats.ops.near.types import KeptPairs, NearRing, NearState
from lolcats.ops.types import SinkKeys

HEADS, KV_HEADS, HIDDEN = 9, 3, 576
SHAPES = [(128, HIDDEN), (128,), (64, 0), (64,), (2 * KV_HEADS, 128), (2 * KV_HEADS,), (2, 64)]


def run(dtype: torch.dtype, size: int) -> list[str]:
    """What is wrong with the kernels."""
    compiler = Compiler()
    for module in (prepare, pairs, hidden, score, collect):
        module.on = compiler  # type: ignore[attr-defined]
    launch_all(dtype, size, batch=2)
    known = set(compiler.kernels)
    launch_all(dtype, size, batch=33)
    return compiler.problems + [f"compiled again: {key}" for key in compiler.kernels - known]


def launch_all(dtype: torch.dtype, size: int, batch: int) -> None:
    """With and without codec, score and sinks, in a pool and not, rotated in one way, another and none."""
    codec = PairCodec(8, plain_map(KV_HEADS, size))
    weights = ScoreWeights(*(torch.empty(a, *(b or 2 * size for b in rest)) for a, *rest in SHAPES))
    angles = torch.empty(batch, 1, size)
    told = ScoreCall(torch.empty(batch, 1, HIDDEN, dtype=dtype), weights, 0.5, 1000, 1024)
    turned = told._replace(cos=angles, sin=angles, layout=("half", "first", "cat"))
    neighbours = turned._replace(
        cos=angles[..., :8].clone(), sin=angles[..., :8].clone(), layout=("interleaved", "last", "single"), fade=None
    )
    length = torch.zeros(2 * batch, dtype=torch.int64)
    sinks = SinkCall(angles, angles, ("half", "first", "cat"), angles[:1, :, ::2], angles[:1, :, ::2], 8192 + batch)
    apart = SinkCall(*neighbours[-3:], angles[:1, :, :8], angles[:1, :, :8], 16 * batch)  # type: ignore[arg-type]
    launch(dtype, size, batch, codec, turned, length, length[:batch], None)
    launch(dtype, size, batch, codec, turned, length, length[:batch], sinks)
    launch(dtype, size, batch, codec, neighbours, length, None, apart)
    launch(dtype, size, batch, codec, None, length, None, None)
    launch(dtype, size, batch, None, told, length, None, None)
    launch_texts(dtype, size, batch, codec, told, turned, neighbours)
    launch(dtype, size, batch, None, None, length, None, sinks)


def launch(dtype: torch.dtype, size: int, batch: int, *arguments: Any) -> None:
    """Launch what there is for a token of each of `batch` texts, laid out as by a layer."""
    q, k = (torch.empty(batch, 1, heads, size, dtype=dtype).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    prepare.code_pairs_and_score(q, k, k, *arguments)
    if arguments[1] is None:  # values may be narrower than keys, not so where this score reads both
        prepare.code_pairs_and_score(q, k, k[..., : size // 2], *arguments)


def launch_texts(dtype: torch.dtype, size: int, batch: int, codec: PairCodec, *scores: ScoreCall) -> None:
    """The same for texts of many tokens."""
    tokens = 100 * batch + 1
    k = torch.empty(1, tokens, KV_HEADS, size, dtype=dtype).transpose(1, 2)
    pairs.code_pairs(k, k, codec.key_map, False)
    pairs.code_pairs(k, k[..., : size // 2], codec.key_map, True)  # values may be narrower than keys
    coded = pairs.code_pairs(k, k, codec.key_map, True)
    launch_slots(tokens, (k, k))
    if coded.keys is not None and coded.values is not None:
        launch_slots(tokens, (coded.keys, coded.values))
    for told in scores:
        cos, sin = (None if x is None else x[:1].expand(-1, tokens, -1) for x in (told.cos, told.sin))
        numbers = hidden.read_texts(torch.empty(1, tokens, HIDDEN, dtype=dtype), told.weights)
        score.score_pairs(k, k, numbers, told._replace(cos=cos, sin=sin))


def launch_slots(tokens: int, new: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Those of the states of key heads of several sizes, after a state and not."""
    sizes = head_sizes(((tokens // 3, 7, (0, 2)), (5, tokens // 5, (1,))), torch.device("cpu"))
    marks, after = torch.empty(1, KV_HEADS, tokens), torch.zeros(1, KV_HEADS, 3, sizes.most_pairs, dtype=torch.int32)

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (torch.zeros(1, KV_HEADS, count, x.shape[3], dtype=x.dtype) for x in new)
        return k, v

    window, place, most = torch.zeros(1, KV_HEADS, sizes.most_window), torch.zeros(1).long(), sizes.most_pairs
    kept = KeptPairs(*rows(most), torch.zeros(1, KV_HEADS, most), torch.zeros(1, KV_HEADS, most, dtype=torch.int32))
    held = NearState(NearRing(*rows(sizes.most_window), window), SinkKeys(*rows(4)), kept, place)
    for is_fresh in (True, False):
        ends = Ends(place, place, is_fresh)
        collect.leaving_scores(marks, window, sizes, ends, 4)
        collect.collect_slots(new, held, marks, marks, after[:, :, 1], sizes, ends, 4)
        collect.collect_slots(new, held._replace(sinks=None), marks, marks, after[:, :, 1], sizes, ends, 0)


if __name__ == "__main__":
    for line in run(getattr(torch, sys.argv[1]), int(sys.argv[2])):
        print(line)
