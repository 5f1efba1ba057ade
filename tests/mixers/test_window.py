"""The window of the same memory takes no more bytes than the layer, and not a token's less."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from lolcats.config import LinearizationConfig
from lolcats.mixers import Sizes, build_mixer, equal_window
from lolcats.mixers.blend import BlendMixer
from lolcats.modeling import attention_mode, linearized_layers

SIZES = Sizes(heads=4, kv_heads=2, head_dim=16, value_dim=8, hidden_size=10)


@pytest.mark.parametrize(
    "settings",
    [
        {"mixer": "hybrid", "window": 4, "sinks": 2},
        {"mixer": "hybrid", "window": 3, "state_heads": "kv"},
        {"mixer": "blend", "window": 9, "kept": {"pairs": 11}},
        {"mixer": "blend", "window": 9, "kept": {"pairs": 11}, "bits": 8, "far": "none"},
        {"mixer": "blend", "window": 2, "sinks": 0, "bits": 4, "far": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_many_bytes(settings: dict[str, Any], dtype: torch.dtype) -> None:
    mixer = build_mixer(settings["mixer"], SIZES, **LinearizationConfig(**settings).values())
    window = equal_window(mixer, dtype)
    own, budget = window.state_spec(dtype).nbytes, mixer.state_spec(dtype).nbytes
    assert own <= budget
    window.settings = window.settings._replace(window=window.settings.window + 1)
    assert window.state_spec(dtype).nbytes > budget
    assert window.bits == settings.get("bits", 16)


@torch.no_grad()
def test_a_model_with_it_is_softmax_while_a_text_fits(make_student: Any, tokens: Any) -> None:
    """Its state is 8 KV tokens of window and 2 of sinks and more for what is linear: 12 tokens fit, 40 do not."""
    student = make_student(window=8, sinks=2, fold=1)
    short, long = tokens(2, 12), tokens(2, 40)
    with attention_mode(student, "softmax"):
        exact = [student(x, use_cache=False).logits for x in (short, long)]
    with attention_mode(student, "equal_window"):
        torch.testing.assert_close(student(short, use_cache=False).logits, exact[0])
        whole = student(long, use_cache=False).logits
        assert float((whole - exact[1])[:, 30:].abs().max()) > 1e-3
        first = student(long[:, :31], use_cache=True)
        rest = student(long[:, 31:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)
        torch.testing.assert_close(student.generate(long, max_new_tokens=3)[:, :40], long)


def test_weights_that_are_widened_do_not_change_the_window(make_student: Any) -> None:
    """A state with sums in float32 is worth fewer tokens of float32 than of bfloat16; the memory is that of the run."""
    layer = linearized_layers(make_student(window=4))[0]
    wide, narrow = (cast(BlendMixer, layer.window(dtype)).settings.window for dtype in (torch.float32, torch.bfloat16))
    layer.memory_dtype = torch.bfloat16
    assert cast(BlendMixer, layer.window(torch.float32)).settings.window == narrow > wide
