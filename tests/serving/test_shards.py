"""Layers whose heads are divided over devices give what whole ones give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.mixers import Call, Mixer, Rotation, Sizes, build_mixer
from lolcats.mixers.rotation import Layout
from lolcats.serving.vllm_plugin.shard import Shard, check_shards
from lolcats.serving.vllm_plugin.weights import MixerWeights

SIZES = Sizes(heads=8, kv_heads=4, head_dim=6, value_dim=6, hidden_size=10)
KEPT = {"pairs": 3, "score": "learned"}
MIXERS: dict[str, dict[str, Any]] = {
    "hybrid": {"mixer": "hybrid", "window": 3, "sinks": 1, "feature_map": "t2r", "decay": "gate"},
    "hybrid by key head": {"mixer": "hybrid", "window": 3, "state_heads": "kv"},
    "blend of two sizes": {
        "mixer": "blend", "far": "none", "bits": 4, "kept": KEPT, "split": [[[4, 3], [2, 0], [4, 3], [3, 4]]],
    },
    "blend by query head": {"mixer": "blend", "window": 3, "kept": KEPT, "state_heads": "query"},
    "blend that recalls": {"mixer": "blend", "window": 3, "kept": KEPT | {"recall_error": True}, "far": "kda"},
}  # fmt: skip


def build(settings: dict[str, Any], shard: Shard) -> Mixer:
    config = LinearizationConfig(**settings)
    return build_mixer(config.mixer, shard.sizes(SIZES), **shard.values(config.values(), SIZES))


def make(settings: dict[str, Any]) -> Mixer:
    """Whole, with parameters of chance."""
    mixer = build(settings, Shard())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in mixer.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
            else:
                tensor.copy_(torch.stack([torch.randperm(6, generator=generator) for _ in range(4)]))
    return mixer


def tokens(count: int) -> Call:
    generator = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(2, heads, count, 6, generator=generator) for heads in (8, 4, 4))
    hidden, angles = (torch.randn(2, count, size, generator=generator) for size in (10, 6))
    return Call(q, k, v, hidden, 6**-0.5, rotation=Rotation(angles.cos(), angles.sin(), Layout("half")))


def part(call: Call, shard: Shard) -> Call:
    """What arrives at a device."""
    sizes = shard.sizes(SIZES)

    def take(x: Tensor, heads: int) -> Tensor:
        return shard.take(x, torch.Size((len(x), heads, *x.shape[2:])))

    q, k, v = take(call.q, sizes.heads), take(call.k, sizes.kv_heads), take(call.v, sizes.kv_heads)
    return replace(call, q=q, k=k, v=v)


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("settings", MIXERS.values(), ids=MIXERS.keys())
def test_the_heads_of_all_devices_are_those_of_the_layer(settings: dict[str, Any], ranks: int) -> None:
    """Over a text and a step; with 8 devices, two have the same key head."""
    whole, first, second = make(settings), tokens(11), tokens(1)
    expected, state = whole(first, keep=True)
    then, _ = whole.step(second, state)
    outs = []
    for rank in range(ranks):
        shard = Shard(rank, ranks)
        mixer, weights = build(settings, shard), MixerWeights()
        saved = ((f"model.layers.0.self_attn.mixer.{name}", x) for name, x in whole.state_dict().items())
        assert list(weights.family(saved)) == []
        weights.load({0: mixer}, {0: whole}, shard)
        out, state = mixer(part(first, shard), keep=True)
        outs.append((out, mixer.step(part(second, shard), state)[0]))
    for own, wanted in zip(zip(*outs, strict=True), (expected, then), strict=True):
        torch.testing.assert_close(torch.cat(own, 1), wanted, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "heads": (3, {}, "it has 8 query and 4 key heads, which cannot be divided over as many"),
    "chance": (2, {"kept": {"pairs": 2, "score": "random"}}, "chosen by chance, which is another one on each device"),
    "recall": (
        8, {"kept": KEPT | {"recall_error": True}, "state_heads": "query"},
        "all 2 query heads of a key head recall, .*; use at most 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_divided(ranks: int, settings: dict[str, Any], message: str) -> None:
    values = LinearizationConfig(mixer="blend", **settings).values()
    with pytest.raises(LolcatsError, match=f"tensor_parallel_size {ranks}: .*{message}"):
        check_shards(ranks, SIZES, values)
    check_shards(1, SIZES, values)
