"""States of any mixer as bytes in pages, and prompts in rows, without an engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.config import LinearizationConfig
from lolcats.mixers import Call, Mixer, Rotation, Sizes, build_mixer, map_state, state_tensors
from lolcats.mixers.rotation import Layout
from lolcats.mixers.state import put_rows, take_rows
from lolcats.serving.vllm_plugin.batch import WASTE, group_rows
from lolcats.serving.vllm_plugin.layout import ALIGNMENT, PageLayout, empty_page, pool_in_pages

SIZES = Sizes(heads=4, kv_heads=2, head_dim=6, value_dim=6, hidden_size=10)
MIXERS: list[dict[str, Any]] = [
    {"mixer": "hybrid", "window": 3, "sinks": 1, "fold": 2},
    {"mixer": "blend", "window": 3, "sinks": 1, "kept": {"pairs": 2}, "bits": 8, "far": "none"},
    {"mixer": "blend", "kept": {"pairs": 2}, "split": [[[4, 3], [2, 0]]]},
    {"mixer": "blend", "window": 2, "far": "gated_delta", "state_dtype": "bfloat16"},
]


def make(settings: dict[str, Any]) -> Mixer:
    torch.manual_seed(0)
    config = LinearizationConfig(**settings)
    return build_mixer(config.mixer, SIZES, **config.values())


def tokens(rows: int, count: int) -> Call:
    generator = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(rows, heads, count, 6, generator=generator) for heads in (4, 2, 2))
    hidden, angles = (torch.randn(rows, count, size, generator=generator) for size in (10, 6))
    return Call(q, k, v, hidden, 6**-0.5, rotation=Rotation(angles.cos(), angles.sin(), Layout("half")))


@torch.no_grad()
def test_a_pool_in_pages_is_a_pool() -> None:
    """All layers in one page, which may be longer than it has to be: no page touches another."""
    mixers = [make(settings) for settings in MIXERS]
    layout = PageLayout.of([mixer.state_spec(torch.float32) for mixer in mixers])
    assert all(offset % ALIGNMENT == 0 for offset in itertools.chain(*layout.offsets))
    assert layout.nbytes >= sum(mixer.state_spec(torch.float32).nbytes for mixer in mixers)
    memory = torch.full((5, layout.nbytes + ALIGNMENT), 7, dtype=torch.uint8)
    pages, slots = memory[:, : layout.nbytes], torch.tensor([3, 1])
    pages.index_copy_(0, slots, empty_page(mixers, torch.float32, layout).expand(2, -1))
    for mixer, offsets in zip(mixers, layout.offsets, strict=True):
        pool = pool_in_pages(pages, offsets, mixer.empty_state(1, torch.float32))
        plain = mixer.empty_state(2, torch.float32)
        for new, old in zip(state_tensors(take_rows(pool, slots)), state_tensors(plain), strict=True):
            assert torch.equal(new, old)
        first, second = tokens(2, 7), tokens(2, 1)
        _, state = mixer(first, plain, keep=True)
        put_rows(pool, state, slots)
        expected, after = mixer.step(second, map_state(state, Tensor.clone))
        out, _ = mixer.step(second, pool, slots=slots)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(state_tensors(take_rows(pool, slots)), state_tensors(after))
    assert memory[[0, 2, 4]].eq(7).all() and memory[:, layout.nbytes :].eq(7).all()


@pytest.mark.parametrize("lengths", [[1], [5, 5], [9, 1, 4, 5, 2, 1, 8, 100]])
def test_rows_hold_every_token_once(lengths: list[int]) -> None:
    first = 3  # tokens before the first text
    starts = [first + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    groups = group_rows(starts)
    places = torch.cat([rows.places for rows in groups])
    assert places.sort().values.tolist() == list(range(first, starts[-1]))
    assert sorted(torch.cat([rows.numbers for rows in groups]).tolist()) == list(range(len(lengths)))
    for rows in groups:
        for number, row, real in zip(
            rows.numbers.tolist(),
            rows.token,
            torch.ones_like(rows.token).bool() if rows.padding is None else rows.padding,
            strict=True,
        ):
            assert row[real].tolist() == list(range(starts[number], starts[number + 1]))
            assert len(row) <= WASTE * int(real.sum())
