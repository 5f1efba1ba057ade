"""What the start from text measures of keys in few bits goes where the layer goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lolcats import LinearizationConfig, convert
from lolcats.mixers.blend import BlendMixer
from lolcats.mixers.rotation import Layout, Rotation
from lolcats.modeling import attention_mode, linearized_layers
from lolcats.modeling.attention import measured_buffers

SETTINGS: dict[str, Any] = {"mixer": "blend", "window": 4, "far": "none", "kept": {"pairs": 2}}


def started(teacher: PreTrainedModel, ids: Tensor, **more: Any) -> PreTrainedModel:
    return convert(teacher, LinearizationConfig(**SETTINGS, bits=4, start="matched", **more), input_ids=ids)


def test_the_start_measures(make_teacher: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]) -> None:
    model = started(make_teacher(), tokens())
    maps = list(measured_buffers(model).values())
    assert len(maps) == len(linearized_layers(model)) and not any(m.requires_grad for m in maps)
    for order, scale in maps:
        size = order.shape[-1]
        assert torch.equal(order.sort(-1).values.long(), torch.arange(size).expand_as(order))
        assert bool(scale.any()) and torch.equal(scale, scale.roll(size // 2, -1)), "pairs of channels are alike"


@torch.no_grad()
def test_it_is_saved_and_never_rounded(
    make_teacher: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = started(make_teacher(), tokens())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    narrowed = cast(Any, model).to(torch.bfloat16)
    for narrow in (narrowed, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        for name, held in measured_buffers(narrow).items():
            assert torch.equal(held, measured_buffers(loaded)[name])


@torch.no_grad()
def test_the_window_of_the_same_memory_has_it(
    make_teacher: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]
) -> None:
    model = started(make_teacher(), tokens())
    with attention_mode(model, "equal_window"):
        model(tokens())
    layer = linearized_layers(model)[0]
    held = cast(BlendMixer, layer.mixer)
    held.key_map = cast(Tensor, held.key_map).clone()  # as a move to another device does
    assert cast(BlendMixer, layer.window(torch.float32)).key_map is held.key_map


def test_partners() -> None:
    channels = torch.arange(8)
    for layout, angles, want in (
        (Layout("half"), 4, [2, 3, 0, 1, 4, 5, 6, 7]),
        (Layout("half", "last", "single"), 2, [0, 1, 2, 3, 6, 7, 4, 5]),
        (Layout("interleaved", "first", "repeat"), 8, [1, 0, 3, 2, 5, 4, 7, 6]),
        (Layout("none"), 4, list(range(8))),
    ):
        rotation = Rotation(torch.ones(1, 3, angles), torch.zeros(1, 3, angles), layout)
        assert rotation.partners(channels).tolist() == want
