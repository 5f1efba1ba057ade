"""`impl` is obeyed in prefill and in decoding; what cannot run is an error that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.modeling import linearized_layers
from lolcats.modeling.attention import AttentionCall
from lolcats.training.losses import weight_cross_entropy

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("fast_interpreter")
Students = Callable[..., Any]
Tokens = Callable[..., Tensor]
FIRST, MORE = 6, 3


def decode(student: Any, ids: Tensor) -> tuple[Tensor, list[bool]]:
    """Logits of a few steps, and whether each step changed the state in place (the kernel) or made a new one."""
    cache = student(ids[:, :FIRST]).past_key_values
    logits, in_place = [], []
    for i in range(FIRST, FIRST + MORE):
        before = cache.layers[0].state.window.k
        logits.append(student(ids[:, i : i + 1], past_key_values=cache).logits)
        in_place.append(cache.layers[0].state.window.k is before)
    return torch.cat(logits, 1), in_place


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.slow), "reference", "chunked", "recurrent"])
@torch.no_grad()
def test_a_step_is_made_the_way_that_was_asked_for(
    make_teacher: Students, make_student: Students, tokens: Tokens, impl: str
) -> None:
    ids, teacher = tokens(1, FIRST + MORE), make_teacher(num_hidden_layers=1)
    student = make_student(teacher, window=4, sinks=1, impl=impl).to("cuda" if torch.cuda.is_available() else "cpu")
    got, in_place = decode(student, ids.to(student.device))
    expected = make_student(teacher, window=4, sinks=1)(ids).logits[:, FIRST:]
    torch.testing.assert_close(got.cpu(), expected, atol=5e-4, rtol=0)
    assert in_place == [impl == "triton"] * MORE


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 0}, "window of at least 1"),
        ({"window": 4, "feature_size": 4096}, "its tiles hold"),
        ({"window": 4, "feature_map": "elu"}, "'hedgehog' and 't2r' only"),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_step_that_the_kernel_cannot_make_is_an_error(
    make_student: Students, tokens: Tokens, settings: dict[str, Any], says: str
) -> None:
    ids, student = tokens(1, 6), make_student(**settings)
    cache = student(ids).past_key_values
    for layer in linearized_layers(student):
        layer.mixer.impl = "triton"
    with pytest.raises(ValueError, match=rf"impl 'triton' cannot run this decoding step: .*{says}"):
        student(ids[:, :1], past_key_values=cache)


def test_the_kernel_refuses_to_decode_with_gradients_and_without_a_device(
    make_student: Students, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, student = tokens(1, 6), make_student(window=4)
    cache = student(ids).past_key_values
    for layer in linearized_layers(student):
        layer.mixer.impl = "triton"
    with pytest.raises(ValueError, match=r"gives no gradients"):
        student(ids[:, :1], past_key_values=cache)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.no_grad(), pytest.raises(ValueError, match=r"needs a CUDA device"):
        student.cpu()(ids[:, :1], past_key_values=cache)


def test_the_loss_of_weights_asks_the_layers_implementation(
    make_student: Students, tokens: Tokens, record_calls: Callable[..., Any]
) -> None:
    values = {}
    for impl in ("auto", "reference", "recurrent"):
        student = make_student(window=4, impl=impl)
        layer: Any
        call: AttentionCall
        layer, call, _ = record_calls(student, tokens(1, 12))[0]
        values[impl] = float(weight_cross_entropy(layer.mixer, call, None).detach())
        layer.mixer.impl = "no such"
        with pytest.raises(ValueError, match=r"impl must be one of"):
            weight_cross_entropy(layer.mixer, call, None)
    assert max(values.values()) - min(values.values()) < 1e-4
