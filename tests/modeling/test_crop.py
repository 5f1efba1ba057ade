"""Tokens taken back from the cache are as if they had never been read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from decode_cases import SETTINGS, assert_close, eager, read, step, with_stand_in
from lolcats import LolcatsError, load_state, save_state
from lolcats.mixers import state_tensors
from lolcats.modeling import LinearizedLayer
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.generating import record_past
from lolcats.modeling.taking_back import HELD

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")

CLOSE = 1e-10
"""Of numbers in float64; in float32 some codes of 8 bits would differ by one, as products of fewer rows do."""
LAYERS: dict[str, dict[str, Any]] = SETTINGS | {
    "linear": {"window": 0, "sinks": 0, "fold": 1},
    "kv-gate": {"window": 6, "sinks": 2, "decay": "gate", "state_heads": "kv", "fold": 4},
    "4bit": {"mixer": "blend", "window": 4, "far": "none", "bits": 4, "kept": {"pairs": 4}},
    "kda": {"mixer": "blend", "window": 4, "far": "kda"},
    "mamba2": {"mixer": "blend", "window": 3, "sinks": 1, "far": "mamba2", "kept": {"pairs": 2}},
    "mixed": {"window": 4, "layers": [0, 2]},
    "mixed-heads": {"mixer": "blend", "sinks": 1, "split": [[[2, 0], [5, 3]]], "bits": 8, "layers": [1]},
}


def held(cache: Any) -> list[Tensor]:
    """All that a cache holds."""
    found = []
    for layer in cache.layers:
        found += state_tensors(layer.state) if isinstance(layer, LinearizedLayer) else [layer.keys, layer.values]
    return found


def assert_same(got: Any, want: Any) -> None:
    """Two caches hold the same, up to rounding."""
    assert got.get_seq_length() == want.get_seq_length()
    facts = [[getattr(layer, "seen", None) for layer in cache.layers] for cache in (got, want)]
    assert facts[0] == facts[1]
    for one, other in zip(held(got), held(want), strict=True):
        relative = 4e-3 if one.dtype in (torch.float16, torch.bfloat16) else CLOSE
        torch.testing.assert_close(one, other, atol=CLOSE, rtol=relative)


def after(student: Any, *parts: Tensor) -> Any:
    """A cache with a text that was read in parts, of which some are empty."""
    cache = DynamicCache(config=student.config)
    for part in parts:
        if part.shape[1]:
            student(part, past_key_values=cache)
    return cache


@pytest.mark.parametrize("prompt", [0, 17])
@pytest.mark.parametrize("name", LAYERS)
def test_taken_back_is_never_read(make_student: Students, tokens: Tokens, name: str, prompt: int) -> None:
    student, ids = make_student(**LAYERS[name]).double(), tokens(2, 40)
    for stay in (0, 1, 5, 11):
        first, kept = ids[:, :prompt], ids[:, prompt : prompt + stay]
        cache, plain = after(student, first, ids[:, prompt : prompt + 12]), after(student, first, kept)
        cache.crop(stay - 12)
        if prompt + stay:
            assert_same(cache, plain)
        assert cache.get_seq_length() == prompt + stay
        for part in tokens(2, 6, 1).split([1, 5], 1):
            got, want = (student(part, past_key_values=c).logits for c in (cache, plain))
            assert_close(got, want, CLOSE)


@pytest.mark.parametrize("name", ["sliding", "heads"])
def test_again_and_by_nothing(make_student: Students, tokens: Tokens, name: str) -> None:
    student, ids = make_student(**LAYERS[name]).double(), tokens(2, 20)
    cache = after(student, ids[:, :10], ids[:, 10:])
    before = [t.clone() for t in held(cache)]
    cache.crop(0)
    assert all(torch.equal(one, other) for one, other in zip(before, held(cache), strict=True))
    for stay in (16, 13, 11, 10):
        cache.crop(stay - cache.get_seq_length())
        assert_same(cache, after(student, ids[:, :10], ids[:, 10:stay]))
    with pytest.raises(LolcatsError, match=r"its last 1 tokens \(crop\): 0 can be taken back"):
        cache.crop(-1)
    assert_same(cache, after(student, ids[:, :10]))


def test_a_length_is_left_as_older_releases_ask(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens(1, 20)
    cache = after(student, ids[:, :10], ids[:, 10:])
    for layer in cache.layers:
        layer.crop(25)
        layer.crop(14)
    assert [layer.seen for layer in cache.layers] == [14] * 3


def test_a_call_is_held_only_while_it_is_the_last(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens(1, HELD + 21)
    cache = after(student, ids[:, :10], ids[:, 10:16])
    assert all(layer.record.call.tokens == 6 for layer in cache.layers)
    student(ids[:, :1], past_key_values=cache)
    assert all(layer.record.call is None for layer in cache.layers)
    for change in (lambda c: c.reorder_cache(torch.tensor([0])), lambda c: c.reset(), lambda c: c.layers[0].detach()):
        cache = after(student, ids[:, :10])
        change(cache)
        assert cache.layers[0].record.call is None
    assert all(layer.record.call is None for layer in copy.deepcopy(after(student, ids[:, :10])).layers)
    assert all(layer.record.call is None for layer in after(student, ids[:, : HELD + 1]).layers)
    with torch.enable_grad():
        assert all(layer.record.call is None for layer in after(student, ids[:, :10]).layers)


@pytest.mark.parametrize("name", ["sliding", "heads", "mixed"])
def test_of_a_long_call_the_end_is_held_if_that_is_asked(make_student: Students, tokens: Tokens, name: str) -> None:
    student, ids = make_student(**LAYERS[name]).double(), tokens(1, HELD + 37)
    cache = after(student, ids[:, :7])
    cache.activate_past_recording()
    got = student(ids[:, 7:], past_key_values=cache).logits
    assert_close(got, student(ids).logits[:, 7:], CLOSE)
    for layer in (layer for layer in cache.layers if isinstance(layer, LinearizedLayer)):
        call = layer.record.call
        assert call is not None
        assert call.tokens == HELD
        tensors = [call.call.q, call.call.k, call.call.v, call.call.hidden]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)  # nothing of the rest is held
    cache.crop(-(HELD - 2))
    assert_same(cache, after(student, ids[:, :-HELD], ids[:, -HELD : 2 - HELD]))


def refuses(cache: Any, count: int, can: int) -> None:
    with pytest.raises(LolcatsError, match=rf"its last {count} tokens \(crop\): {can} can be taken back"):
        cache.crop(-count)


def test_what_is_folded_is_refused(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens(1, HELD + 20)
    cache = after(student, ids[:, :10], ids[:, 10:16])
    refuses(cache, 7, 6)
    assert cache.get_seq_length() == 16  # nothing has changed
    cache.crop(-6)
    refuses(after(student, ids[:, :10], ids[:, 10:16], ids[:, 16:17]), 1, 0)
    refuses(after(student, ids), 1, 0)
    many = after(student, tokens(8, 9))
    refuses(many, 1, 0)
    many.activate_past_recording()
    student(tokens(8, 9), past_key_values=many)
    many.crop(-9)
    with torch.enable_grad():
        refuses(after(student, ids[:, :10]), 1, 0)
    static = StaticCache(student.config, max_cache_len=40)
    student(ids[:, :10], past_key_values=static)
    refuses(static, 2, 0)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_refusal_changes_no_layer(make_student: Students, tokens: Tokens, loaded: bool, tmp_path: Path) -> None:
    student, ids = make_student(**LAYERS["mixed-heads"]), tokens(1, 20)  # softmax comes first
    cache = after(student, ids[:, :10], ids[:, 10:16])
    if loaded:
        save_state(cache, tmp_path / "state", student)
        cache = load_state(tmp_path / "state", student)
    before = [t.clone() for t in held(cache)]
    refuses(cache, 8, 0 if loaded else 6)
    assert all(torch.equal(one, other) for one, other in zip(before, held(cache), strict=True))
    assert isinstance(copy.deepcopy(cache), DynamicCache)
    if not loaded:
        cache.crop(-6)
        assert_same(cache, after(student, ids[:, :10]))


def test_padding_is_taken_back_too(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4, sinks=2).double(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    cache = read(student, ids[:, :12], mask[:, :12])
    cache.crop(-4)
    assert_same(cache, read(student, ids[:, :8], mask[:, :8]))
    got = student(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    assert_close(got[0, -1], student(ids[:1, 7:]).logits[0, -1], CLOSE)
    cache.crop(-12)
    assert [layer.whole for layer in cache.layers] == [False] * 3


def test_what_is_left_can_be_saved(make_student: Students, tokens: Tokens, tmp_path: Path) -> None:
    student, ids = make_student(**LAYERS["heads"]), tokens(1, 24)
    cache = after(student, ids[:, :10], ids[:, 10:20])
    cache.crop(-6)
    save_state(cache, tmp_path / "state", student)
    loaded = load_state(tmp_path / "state", student)
    assert loaded.get_seq_length() == 14
    got, want = (student(ids[:, 14:], past_key_values=c).logits for c in (loaded, cache))
    assert torch.equal(got, want)


def graphed(student: Any) -> Any:
    with_stand_in(student)
    return student


@pytest.mark.parametrize("disturbed", [False, True])
@pytest.mark.parametrize("name", ["terraced", "heads"])
def test_buffers_of_graphs_stay_right(make_student: Students, tokens: Tokens, name: str, disturbed: bool) -> None:
    settings = SETTINGS[name] | ({"bits": 16} if name == "heads" else {})  # rounding in few bits is not continuous
    student, ids, other = graphed(make_student(**settings)), tokens(1, 40), tokens(1, 30, 1)
    want, found, at = eager(student, lambda: student(ids).logits), [], 8
    cache = after(student, ids[:, :at])
    for stay in (0, 1, 3, 5, 0):
        found += [(at + i, step(student, ids[:, at + i, None], cache)) for i in range(3)]
        at += 3
        student(torch.cat([ids[:, at : at + stay], other[:, : 5 - stay]], 1), past_key_values=cache)
        if disturbed:  # another text has the buffers
            text = after(student, other[:, :9])
            for i in range(9, 12):
                step(student, other[:, i, None], text)
        cache.crop(stay - 5)
        at += stay
    found += [(at + i, step(student, ids[:, at + i, None], cache)) for i in range(3)]
    for where, got in found:
        assert_close(got, want[:, where], 1e-5)
    assert graphs_of(student).replays >= 14


def drafting(student: Any, prompt: Tensor) -> Any:
    """A cache as `generate` makes it for a model that drafts, with a prompt in it."""
    cache = DynamicCache(config=student.config)
    record_past(student, cache, True)
    student(prompt, past_key_values=cache)
    return cache


def check_steps(student: Any, ids: Tensor, backs: tuple[int, ...]) -> None:
    """Of a call of 7 tokens and 5 steps some are taken back."""
    want = student(ids).logits
    for back in backs:
        cache = drafting(student, ids[:, :7])
        for at in range(7, 12):
            assert_close(step(student, ids[:, at, None], cache), want[:, at], 1e-5)
        cache.crop(-back)
        assert cache.get_seq_length() == 12 - back
        got = student(ids[:, 12 - back :], past_key_values=cache).logits
        assert_close(got, want[:, 12 - back :], 1e-5)


@pytest.mark.parametrize("name", ["sliding", "kept", "heads", "mixed"])
def test_who_drafts_takes_steps_back(make_student: Students, tokens: Tokens, name: str) -> None:
    check_steps(make_student(**LAYERS[name]), tokens(1, 16), (1, 3, 5, 6, 11, 12))


@pytest.mark.parametrize("name", ["terraced", "heads"])
def test_steps_of_graphs_too(make_student: Students, tokens: Tokens, name: str) -> None:
    student = graphed(make_student(**SETTINGS[name]))
    check_steps(student, tokens(1, 16), (3, 1, 5, 6, 11, 12))
    assert graphs_of(student).replays == 29


@pytest.mark.slow
@pytest.mark.usefixtures("fast_interpreter")
@pytest.mark.parametrize("name", ["sliding", "bytes"])
def test_steps_that_are_written_in_place_too(
    make_teacher: Students, make_student: Students, tokens: Tokens, name: str
) -> None:
    pytest.importorskip("triton")
    check_steps(make_student(make_teacher(num_hidden_layers=1), **SETTINGS[name], impl="triton"), tokens(1, 13), (6,))


def test_so_many_steps_are_held(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4, sinks=1), tokens(1, HELD + 12)
    cache = drafting(student, ids[:, :7])
    for at in range(7, HELD + 8):  # one more than are held
        step(student, ids[:, at, None], cache)
    refuses(cache, HELD + 1, HELD)
    cache.crop(-HELD)
    refuses(cache, 1, 0)
    got, want = student(ids[:, 8:], past_key_values=cache).logits, student(ids).logits[:, 8:]
    assert_close(got, want, 1e-5)
