"""A decoding step of `blend` by kernels is the one in torch: outputs and states, key heads of several sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.config import LinearizationConfig
from lolcats.mixers import Call, Mixer, Sizes, build_mixer, map_state, state_tensors
from lolcats.mixers.rotation import Layout, Reach, Rotation
from lolcats.ops.near import NearState

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SIZES = Sizes(heads=6, kv_heads=3, head_dim=16, value_dim=16, hidden_size=40)
SPLIT = [[5, 3], [2, 0], [5, 3]]
BEGIN, END = 12, 16
"""Tokens that are read at once, and all."""


def make(impl: str, **settings: Any) -> Mixer:
    torch.manual_seed(0)
    kept = {"score": "learned", "fade": 50, **settings.pop("kept", {})}
    values: dict[str, Any] = {"mixer": "blend", "far": "none", "sinks": 2, "kept": kept, "impl": impl, **settings}
    return build_mixer("blend", SIZES, **LinearizationConfig(**values, split=[SPLIT]).values()).to(DEVICE)


def tokens(rows: int = 3, context: int | None = None) -> Call:
    """Of a model that was made for so long a text."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(DEVICE)

    angles = torch.outer(torch.arange(END), torch.tensor([1.0, 0.1, 0.01, 0.001])).to(DEVICE)
    angles = torch.cat([angles, angles], -1)[None]
    rotation = Rotation(angles.cos(), angles.sin(), Layout("half"))
    q, k = rotation.apply(random(6, END, 16)), rotation.apply(random(3, END, 16))
    reach = None
    if context is not None:
        cos, sin = (x[:, context - 1 : context, :4] for x in rotation[:2])
        reach = Reach(context, Rotation(cos, sin, Layout("half", angles="single")))
    return Call(q, k, random(3, END, 16), random(END, 40), 0.25, rotation=rotation, reach=reach)


def part(call: Call, begin: int, end: int) -> Call:
    turn = call.rotation and call.rotation._replace(
        cos=call.rotation.cos[:, begin:end], sin=call.rotation.sin[:, begin:end]
    )
    q, k, v = (x[:, :, begin:end] for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, hidden=call.hidden[:, begin:end], rotation=turn)


SETTINGS: list[Any] = [
    {"bits": 8, "far": "linear"},
    {"bits": 16},
    {"bits": 8, "context": 14},
    *(
        pytest.param(settings, marks=pytest.mark.exhaustive)
        for settings in (
            {"bits": 8},
            {"bits": 4},
            {"bits": 8, "kept": {"score": "recency"}},
            {"bits": 16, "kept": {"score": "recency"}, "context": 13},
            {"bits": 16, "context": 14, "rotate_far": True},
        )
    ),
    {"bits": 8, "rotate_far": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_steps(settings: dict[str, Any]) -> None:
    """With a row that pauses, as texts do that are padded on the left."""
    call = tokens(context=settings.get("context"))
    kernel, plain = (make("auto", **{n: x for n, x in settings.items() if n != "context"}) for _ in range(2))
    kernel.impl = "triton"  # of near attention; the full pass and far halves stay as they are
    _, state = plain(part(call, 0, BEGIN), None, keep=True)
    fused = map_state(state, lambda t: t.clone())
    for i in range(BEGIN, END):
        one = part(call, i, i + 1)
        one.padding = (torch.arange(3, device=DEVICE) != i % 4)[:, None] if i % 2 else None
        want, state = plain(one, state, keep=True)
        got, fused = kernel(one, fused, keep=True)
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    for mine, its in zip(_sorted(fused), _sorted(state), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_which_steps_are_prepared_by_kernels() -> None:
    """Else the tests above would compare torch with itself: the score where it is a learned one, and 8 bits."""
    call = tokens()
    for settings, score in (({"bits": 8}, True), ({"bits": 8, "kept": {"score": "recency"}}, False)):
        kernel: Any = make("auto", **settings)
        _, state = kernel(part(call, 0, BEGIN), None, keep=True)
        one = part(call, BEGIN, BEGIN + 1)
        assert DEVICE == "cuda" or kernel._prepared(one, state, "full", None) is None, "without a GPU, unless asked for"
        kernel.impl = "triton"
        ready = kernel._prepared(one, state, "full", None)
        assert ready is not None and ready.k.dtype == torch.uint8 and (ready.score is not None) == score
        assert ready.sink_q is None
    far, kernel = tokens(context=14), make("triton", bits=16, kept={"score": "recency"})
    new = kernel.empty_state(3, torch.float32, DEVICE)
    for call, wanted in ((far, True), (replace(far, end=14), False)):
        ready = kernel._prepared(part(call, BEGIN, BEGIN + 1), new, "full", None)
        assert (ready is not None and ready.sink_q is not None) == wanted
    kernel = make("triton", bits=4)
    new = kernel.empty_state(3, torch.float32, DEVICE)
    assert kernel._prepared(part(call, BEGIN, BEGIN + 1), new, "full", None) is None


@torch.no_grad()
def test_a_pool() -> None:
    """Rows in any order, one of them without a text."""
    call, kernel, plain = tokens(context=14), make("auto", bits=8), make("auto", bits=8)
    kernel.impl = "triton"
    _, state = plain(part(call, 0, BEGIN), None, keep=True)
    pool = map_state(state, lambda t: torch.cat([torch.zeros_like(t), t]))
    slots = torch.tensor([4, -1, 3], device=DEVICE)
    order = torch.tensor([1, 1, 0], device=DEVICE)
    for i in range(BEGIN, END):
        one = part(call, i, i + 1)
        rows = replace(one, **{n: getattr(one, n).index_select(0, order) for n in ("q", "k", "v", "hidden")})
        want, state = plain(one, state, keep=True)
        got, _ = kernel.step(rows, pool, slots=slots)
        torch.testing.assert_close(got[[0, 2]], want[[1, 0]], rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_steps_after_a_prompt_that_kernels_read() -> None:
    """All key heads at once; the parts of one text's state lie in one piece of memory, where steps change them."""
    call, kernel, plain = tokens(1), make("auto", bits=8), make("auto", bits=8)
    kernel.impl = "triton"
    want, state = plain(part(call, 0, BEGIN), None, keep=True)
    got, fused = kernel(part(call, 0, BEGIN), None, keep=True)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    for i in range(BEGIN, END):
        want, state = plain(part(call, i, i + 1), state, keep=True)
        got, fused = kernel(part(call, i, i + 1), fused, keep=True)
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    for mine, its in zip(_sorted(fused), _sorted(state), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def _sorted(state: Any) -> list[Tensor]:
    """The tensors of a state, kept pairs in the order of their positions."""
    near: Any = (state.near,) if isinstance(state.near, NearState) else state.near
    far = [] if state.far is None else state_tensors(state.far)
    return [t for group in near for t in group.in_order().tensors()] + far
