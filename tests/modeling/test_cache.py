"""The cache of converted models: constant size, float32 sums, and every operation that `generate` asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from lolcats.mixers import state_tensors
from lolcats.modeling import attention_mode, state_bytes

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")


def filled(model: Any, ids: Tensor) -> Any:
    return model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values


@pytest.mark.parametrize(
    "settings",
    [{"window": 16}, {"window": 8, "sinks": 4, "window_kind": "terraced"}, {"window": 16, "decay": "gate", "fold": 5}],
    ids=str,
)
def test_size_is_the_same_after_100_and_1000_tokens(
    make_student: Students, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student = make_student(**settings)
    cache = filled(student, tokens(1, 100))
    size = state_bytes(cache)
    assert size > 0
    for _ in range(4):
        student(tokens(1, 225), past_key_values=cache)
    assert cache.get_seq_length() == 1000
    assert state_bytes(cache) == size
    stores = [t.untyped_storage() for layer in cache.layers for t in state_tensors(layer.state)]
    held = {store.data_ptr(): store.nbytes() for store in stores}
    assert sum(held.values()) <= 2 * size  # no view of something longer


def test_size_is_what_the_formula_says(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=8, sinks=3, fold=5)
    layers, rows, heads, kv, size, features = 3, 2, 6, 2, 6, 12
    ring = kv * (8 + 4) * 2 * size * 4  # keys and values of the window, and of those that wait
    sinks = kv * 3 * 2 * size * 4
    linear = heads * features * (size + 1) * 4
    assert state_bytes(filled(student, tokens(2, 50))) == layers * rows * (ring + sinks + linear + 8)


def test_keys_are_not_repeated_to_query_heads(make_student: Students, tokens: Tokens) -> None:
    for steps in (0, 3):
        student = make_student(window=8, sinks=2, decay="gate", fold=4)
        cache = filled(student, tokens(2, 20))
        for i in range(steps):
            student(tokens(2, 20)[:, i : i + 1], past_key_values=cache)
        for layer in cache.layers:
            state = layer.state
            assert state.window.k.shape == state.window.v.shape == (2, 2, 8 + 3, 6)
            assert state.sinks.k.shape == (2, 2, 2, 6)
            assert state.window.phi_k is None


def test_sums_are_float32_in_a_bfloat16_model(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4, sinks=2)
    for _name, module in student.named_children():
        module.to(torch.bfloat16)
    cache = filled(student, tokens(2, 20))
    student(tokens(2, 1), past_key_values=cache)
    for layer in cache.layers:
        assert {t.dtype for t in layer.state.linear} == {torch.float32}
        assert {layer.state.window.k.dtype, layer.state.window.v.dtype, layer.state.sinks.k.dtype} == {torch.bfloat16}


def test_a_cache_made_without_a_config_works(make_student: Students, tokens: Tokens) -> None:
    for layers in ("all", [1]):
        student, ids = make_student(window=4, layers=layers), tokens()
        cache = DynamicCache()
        parts = [student(part, past_key_values=cache).logits for part in ids.split([10, 1, 13], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), student(ids).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("layers", ["all", [0, 2]])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_move(make_student: Students, tokens: Tokens, layers: Any, change: Any, rows: list[int]) -> None:
    student, ids = make_student(window=4, sinks=2, layers=layers), tokens(3, 20)
    cache = filled(student, ids[:, :15])
    change(cache)
    got = student(ids[rows, 15:], past_key_values=cache).logits
    torch.testing.assert_close(got, student(ids[rows]).logits[:, 15:], atol=2e-4, rtol=0)


def test_reset_forgets_everything(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4, sinks=2), tokens()
    cache = filled(student, tokens(seed=5))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert state_bytes(cache) == 0
    torch.testing.assert_close(student(ids, past_key_values=cache).logits, student(ids).logits, atol=1e-5, rtol=0)


def test_update_by_another_attention_is_refused(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens()
    cache = filled(student, ids[:, :10])
    with pytest.raises(ValueError, match=r"can only be used by that layer"), attention_mode(student, "softmax"):
        student(ids[:, 10:], past_key_values=cache)


def test_a_cache_filled_by_softmax_layers_is_refused(
    teacher: LlamaForCausalLM, make_student: Students, tokens: Tokens
) -> None:
    ids = tokens()
    cache = filled(teacher, ids[:, :10])
    with pytest.raises(ValueError, match=r"layer 0 holds 10 tokens of softmax attention"):
        make_student(window=4)(ids[:, 10:], past_key_values=cache)


def test_softmax_layers_keep_their_ordinary_cache(make_student: Students, tokens: Tokens) -> None:
    cache = filled(make_student(window=4, layers=[1]), tokens())
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "LinearizedLayer", "DynamicLayer"]
    assert cache.layers[0].keys.shape == (2, 2, 24, 6)
    assert state_bytes(cache) == cache.layers[1].nbytes  # type: ignore[attr-defined]


def test_offload_keeps_the_state(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens()
    cache = filled(student, ids[:, :10])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    got = student(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(got, student(ids).logits[:, 10:], atol=2e-4, rtol=0)
