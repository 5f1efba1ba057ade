"""Bytes of a text are those of the running model, and KV tokens those of its teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lolcats.evaluation.memory import text_memory
from lolcats.modeling import state_bytes


def held(model: Any, tokens: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_kv_tokens(
    make_teacher: Callable[..., Any], make_student: Callable[..., Any], dtype: torch.dtype
) -> None:
    teacher = make_teacher().to(dtype)
    keys: list[torch.Tensor] = [getattr(layer, "keys") for layer in held(teacher, 8).layers]  # noqa: B009
    student = make_student(teacher, window=5, sinks=2)
    memory = text_memory(student)
    assert memory is not None and [layer.layer for layer in memory.layers] == [0, 1, 2]
    assert memory.bytes == sum(layer.bytes for layer in memory.layers) == state_bytes(held(student, 40))
    for layer, key in zip(memory.layers, keys, strict=True):
        assert layer.kv_token_bytes == 2 * key.numel() * key.element_size() // 8
        assert layer.kv_tokens == pytest.approx(layer.bytes / layer.kv_token_bytes, abs=0.01)
    assert memory.kv_tokens == pytest.approx(sum(layer.kv_tokens for layer in memory.layers) / 3, abs=0.02)


def test_layers_that_stay_softmax_do_not_count(
    make_teacher: Callable[..., Any], make_student: Callable[..., Any]
) -> None:
    memory = text_memory(make_student(make_teacher(), layers=[1]))
    assert memory is not None and [layer.layer for layer in memory.layers] == [1]
    assert text_memory(make_teacher()) is None
