"""Static caches: the state stays where it is, so that a decoding step can be one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from lolcats.mixers import state_tensors

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_static_cache_generates_the_same(make_student: Students, tokens: Tokens, layers: Any, beams: int) -> None:
    student, ids = make_student(window=5, sinks=2, layers=layers), tokens()
    student.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    expected = student.generate(ids, **options)
    for _ in range(2):  # the second time the model takes its cache of the first
        assert torch.equal(student.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"window": 5, "sinks": 2, "fold": 3},
        {"mixer": "blend", "sinks": 1, "split": [[4, 2], [[2, 0], [5, 3]]]},
    ],
    ids=str,
)
def test_a_step_is_compiled_once_and_the_state_stays(
    make_teacher: Students, make_student: Students, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student, ids = make_student(make_teacher(num_hidden_layers=2), **settings), tokens(2, 18)
    full = student(ids).logits
    cache = StaticCache(config=student.config, max_cache_len=40)
    prompt, rest = ids[:, :12], ids[:, 12:]
    student(prompt, past_key_values=cache)
    layers: list[Any] = cache.layers
    places = [t.data_ptr() for layer in layers for t in state_tensors(layer.state)]
    compiled = torch.compile(student.forward, fullgraph=True, dynamic=False, backend="eager")
    torch._dynamo.utils.counters.clear()
    steps = [compiled(token, past_key_values=cache).logits for token in rest.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), full[:, 12:], atol=5e-4, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert places == [t.data_ptr() for layer in layers for t in state_tensors(layer.state)]
