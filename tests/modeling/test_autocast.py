"""Models in float32 run under autocast, where a rotary embedding leaves queries and keys wider than values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from decode_cases import SETTINGS, assert_close


@pytest.mark.parametrize("name", SETTINGS)
def test_prompts_steps_and_gradients(
    make_student: Callable[..., Any], tokens: Callable[..., Tensor], name: str
) -> None:
    student, ids = make_student(**SETTINGS[name]), tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        student(ids, use_cache=False).logits.float().square().mean().backward()
        with torch.no_grad():
            cache = DynamicCache(config=student.config)
            got = torch.cat([student(part, past_key_values=cache).logits for part in ids.split([11, 1], 1)], 1)
    with torch.no_grad():
        assert_close(got.float(), student(ids).logits, 0.1)
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) for n, p in student.named_parameters() if "q_proj" in n
    )
