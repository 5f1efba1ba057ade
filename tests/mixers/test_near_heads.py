"""Key heads of different sizes: each is the head of a layer in which all have its sizes, and takes its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.config import LinearizationConfig
from lolcats.mixers import Call, Mixer, Sizes, StateSpec, build_mixer
from lolcats.mixers.near_heads import LENGTH_BYTES, group_heads, head_bytes, read_split
from lolcats.mixers.parts import far_attention
from lolcats.mixers.scores import attention_given, attention_given_beyond
from lolcats.ops.near import NearSpec, NearState

SIZES = Sizes(heads=6, kv_heads=3, head_dim=8, value_dim=4, hidden_size=10)
SPLIT = [[5, 3], [2, 0], [5, 3]]


def make_call(tokens: int = 31, rows: int = 2) -> Call:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    q, k, v = random(6, tokens, 8), random(3, tokens, 8), random(3, tokens, 4)
    return Call(3 * q, k, v, random(tokens, 10), 8**-0.5)


def make(split: Any, **settings: Any) -> Mixer:
    values: dict[str, Any] = {"mixer": "blend", "far": "none", "sinks": 1, "kept": {"score": "oracle"}, **settings}
    return build_mixer("blend", SIZES, **LinearizationConfig(**values, split=[split], rotate_far=True).values())


@torch.no_grad()
def test_each_head_is_that_of_a_layer_of_its_sizes() -> None:
    call, mixer = make_call(), make(SPLIT)
    out = mixer(call)[0]
    for head, size in enumerate(SPLIT):
        alone = make(size)
        queries = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(out[:, queries], alone(call)[0][:, queries])
        assert not torch.allclose(out, alone(call)[0])


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_heads(bits: int, dtype: torch.dtype) -> None:
    mixer = make(SPLIT, bits=bits)
    heads = sum(head_bytes(NearSpec(w, 1, p), SIZES, dtype, bits) for w, p in SPLIT)
    spec = mixer.state_spec(dtype)
    assert spec.nbytes == heads + 2 * LENGTH_BYTES, "two groups"
    assert {name.split(".")[1] for name in spec.names} == {"0", "1"}


@pytest.mark.parametrize("bits", [16, 8])
@torch.no_grad()
def test_autocast_changes_nothing(bits: int) -> None:
    call, mixer = make_call(), make(SPLIT, bits=bits, kept={"score": "recency"})
    want = mixer(call)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer(call)[0], want)


def test_heads_that_are_alike_are_a_layer_as_ever() -> None:
    """One group: the state has the names that it has without a split."""
    names = StateSpec.of(make([4, 2]).empty_state(1, torch.float32)).names
    assert names == StateSpec.of(make([[4, 2]] * 3).empty_state(1, torch.float32)).names
    assert "near.ring.k" in names and isinstance(make([4, 2]).empty_state(1, torch.float32).near, NearState)
    assert read_split([4, 2], 3) == ((4, 2),) * 3
    with pytest.raises(ValueError, match="for 3 key heads; got 2"):
        read_split([[4, 2]] * 2, 3)


@torch.no_grad()
def test_what_is_far_of_a_head_is_beyond_its_window() -> None:
    call, spec = make_call(), NearSpec(1, 1)
    found = far_attention(call, group_heads(spec, ((5, 3), (40, 0), (2, 1)), 3))
    for head, window in enumerate((5, 40, 2)):
        expected = far_attention(call, group_heads(spec._replace(window=window), None, 3))
        for mine, its in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[:, 2 * head : 2 * head + 2], its[:, 2 * head : 2 * head + 2])
    assert (found.mass.sum((0, 2)) == 0).tolist() == [False] * 2 + [True] * 2 + [False] * 2


@torch.no_grad()
def test_the_start_leaves_heads_that_see_all() -> None:
    mixer: Any = make([[5, 0], [40, 0], [2, 0]], far="linear", start="matched")
    mixer.start(make_call(), torch.zeros(0))
    assert (mixer.share.bias == -1.0).tolist() == [False] * 2 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("block", [7, 512])
@torch.no_grad()
def test_attention_given_beyond_windows(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each key head its own, of several at once each, whatever the blocks; windows beyond the text give nothing."""
    call = make_call()
    alone = {window: attention_given(call, window) for window in (1, 3, 9, 50)}
    monkeypatch.setattr("lolcats.mixers.scores.QUERY_BLOCK", block)
    by_head, *each = attention_given_beyond(call, [(3, 50, 9), 1, 3, 9, 50])
    for window, found in zip((1, 3, 9, 50), each, strict=True):
        torch.testing.assert_close(found, alone[window])
    for head, window in enumerate((3, 50, 9)):
        torch.testing.assert_close(by_head[:, head], alone[window][:, head])
