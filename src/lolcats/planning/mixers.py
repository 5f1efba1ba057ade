"""Work and memory of the mixers' own kernels, from their settings.

Legend: H query heads, KV key heads, N tokens of each of B rows, D key size, Dv value size, F features.
"""

from __future__ import annotations

from typing import Literal

from lolcats.mixers import Mixer
from lolcats.mixers.blend import BlendMixer
from lolcats.mixers.feature_maps import FeatureMap
from lolcats.mixers.hybrid import HybridMixer
from lolcats.mixers.scores import HIDDEN_WIDTH
from lolcats.planning.work import Work

Pass = Literal["forward", "transfer", "finetune"]
"""A forward pass; forward and backward of the layer's own parameters; of its input too."""
BLOCK = 64
"""Tokens that kernels work on at once: a window's scores are made for one block more than it holds."""
HYBRID: dict[Pass, float] = {"forward": 1.0, "transfer": 3.24, "finetune": 5.13}
"""Time of a call in forward passes: 0.170, 0.551 and 0.872 ms (docs/performance.md, 4,096 tokens)."""
NEAR: dict[Pass, float] = {"forward": 1.0, "transfer": 1.0, "finetune": 3.04}
"""The same for near attention without its choice of pairs: 0.132 and 0.401 ms (4 x 2,048 tokens)."""
CHOICE = 0.16e-6
"""Seconds for each token of a text, while pairs are chosen one block after the other, whatever the GPU."""
GIVEN = 60e-6
"""Seconds before what a score learns from begins to grow with the text."""
SCORE = 20
"""Bytes for each number of the layer's input that a score reads: to float32, and a norm."""
TILE = 128
"""Tokens of which the kernels keep a sum for the backward pass."""


def mixer_work(mixer: Mixer, rows: int, length: int, what: Pass) -> list[Work]:
    """Of one layer on `rows` texts."""
    tokens = rows * length
    if isinstance(mixer, HybridMixer):
        flops = _hybrid_flops(mixer, mixer.settings.window, mixer.feature_q, mixer.feature_k)
        return [Work("hybrid", tokens * flops * HYBRID[what], kernels=8 * HYBRID[what])]
    if isinstance(mixer, BlendMixer):
        return _blend_work(mixer, rows, length, what)
    return []


def held_for_backward(mixer: Mixer) -> float:
    """Bytes of each token that a mixer keeps for its backward pass beside q, k, v and its output."""
    if isinstance(mixer, HybridMixer):
        features = mixer.feature_q.features
        return 2.0 * mixer.sizes.heads * features * mixer.sizes.value_dim / TILE
    if isinstance(mixer, BlendMixer) and mixer.far is not None:
        return 2.0 * mixer.sizes.heads * (mixer.sizes.head_dim + mixer.sizes.value_dim)
    return 4.0 * mixer.sizes.heads


def _hybrid_flops(mixer: Mixer, window: int, feature_q: FeatureMap, feature_k: FeatureMap) -> float:
    """Of a token: its window, its features, and reading and adding to the sums."""
    s = mixer.sizes
    seen = window + BLOCK if window else BLOCK
    near = 2.0 * s.heads * seen * (s.head_dim + s.value_dim)
    maps = 2.0 * sum(p.numel() for part in (feature_q, feature_k) for p in part.parameters() if p.ndim > 1)
    states = feature_k.heads if feature_k.learned else s.kv_heads
    return near + maps + 2.0 * feature_q.features * s.value_dim * (s.heads + states)


def _blend_work(mixer: BlendMixer, rows: int, length: int, what: Pass) -> list[Work]:
    s, tokens = mixer.sizes, rows * length
    learned = mixer.score is not None and mixer.score.network is not None
    pieces: list[Work] = []
    if mixer.score is not None:
        pieces.append(Work("bytes", bytes=26.0 * tokens * s.kv_heads * s.head_dim, kernels=10))  # before rotation
    if what == "transfer":
        pieces += _score_learns(mixer, length) if learned else []
        if not mixer.output_learns:
            return pieces
    pairs = 0.0
    for group in mixer.groups:
        heads = s.heads * len(group.heads) / s.kv_heads
        seen = group.spec.sinks + group.spec.window + group.spec.pairs
        pairs += heads * min(seen, length / 2)
        pieces.append(Work("near", waiting=CHOICE * length if group.spec.pairs else 0.0, kernels=8 * NEAR[what]))
    pieces.append(Work("near", 2.0 * tokens * pairs * (s.head_dim + s.value_dim) * NEAR[what]))
    if learned:
        pieces.append(_score_reads(mixer, tokens))
    if mixer.far is not None:
        states = 2.0 * s.heads * s.head_dim * s.value_dim * 2
        near = 2.0 * s.heads * BLOCK * (s.head_dim + s.value_dim)
        pieces.append(Work("hybrid", tokens * (states + near) * HYBRID[what], kernels=12 * HYBRID[what]))
    return pieces


def _score_reads(mixer: BlendMixer, tokens: int) -> Work:
    """The score of each key."""
    hidden = mixer.sizes.hidden_size
    return Work("matmul", 2.0 * tokens * hidden * HIDDEN_WIDTH, float(SCORE * tokens * hidden), kernels=20)


def _score_learns(mixer: BlendMixer, length: int) -> list[Work]:
    """What one text of a batch teaches it: the attention that later queries give each key, and a small network."""
    s = mixer.sizes
    given = Work("given", 2.0 * length * length / 2 * s.heads * s.head_dim * 2, kernels=6, waiting=GIVEN)
    return [given, _score_reads(mixer, length).times(3)]
