"""The teacher's attention in two parts: what is far is all that the layer does not see exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.config import LinearizationConfig
from lolcats.mixers import Call, Mixer, Rotation, Sizes, build_mixer
from lolcats.mixers import parts as module
from lolcats.mixers.near_heads import group_heads
from lolcats.mixers.parts import Parts, far_attention
from lolcats.mixers.rotation import Layout
from lolcats.mixers.softmax import capped_softmax
from lolcats.ops.near import NearSpec, kept_until
from lolcats.ops.near.reference import visible

SIZES = Sizes(heads=4, kv_heads=2, head_dim=6, value_dim=4, hidden_size=10)
N = 30
ODD: dict[str, Any] = {"softcap": 2.0, "sink_logits": torch.linspace(-1, 1, 4)}


def make_call(rows: int = 2, seed: int = 0, **extra: Any) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    q, k, v, angles = random(4, N, 6), random(2, N, 6), random(2, N, 4), random(N, 6)
    rotation = Rotation(angles.cos(), angles.sin(), Layout("half"))
    return Call(q * 2, k, v, random(N, 10), 6**-0.5, rotation=rotation, **extra)


def blend(**settings: Any) -> Mixer:
    torch.manual_seed(0)
    mixer = build_mixer("blend", SIZES, **LinearizationConfig(mixer="blend", window=4, sinks=2, **settings).values())
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    return mixer


def teacher_output(call: Call) -> Tensor:
    return capped_softmax(call.q, call.k, call.v, None, call.scale, call.softcap, call.sink_logits)


@pytest.mark.parametrize("pairs", [1, 3, 40])
@pytest.mark.parametrize("n", [5, N, 150])
def test_a_pair_is_kept_until_the_reference_lets_it_go(n: int, pairs: int) -> None:
    spec, generator = NearSpec(window=6, sinks=2, pairs=pairs), torch.Generator().manual_seed(1)
    k, score = torch.randn(2, 2, n, 4), torch.randint(0, 9, (2, 2, n), generator=generator).float()  # many are equal
    until = kept_until(k, k, spec, score)
    for row, kv in ((0, 0), (1, 1)):
        marks = score[row, kv].tolist()
        for i in range(n):
            window = range(max(0, i - spec.window + 1), i + 1)
            kept = [j for j in range(spec.sinks, i - spec.window + 1) if i < until[row, kv, j]]
            assert sorted({*range(min(2, i + 1)), *kept, *window}) == sorted(visible(i, spec, marks))


@pytest.mark.parametrize("extra", [{}, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("pairs", [0, 3])
def test_the_far_part_is_the_sum_over_what_the_reference_does_not_see(
    pairs: int, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERY_BLOCK", 16)
    call, spec = make_call(**extra), NearSpec(window=4, sinks=2, pairs=pairs)
    score = torch.randn(2, 2, N, generator=torch.Generator().manual_seed(2)) if pairs else None
    until = None if score is None else kept_until(call.k, call.v, spec, score)
    found = far_attention(call, group_heads(spec, None, 2), until)
    for row, head, i in ((0, 0, 29), (0, 3, 11), (1, 1, 6), (1, 2, 3), (1, 2, 20)):
        products = call.q[row, head, i] @ call.k[row, head // 2, : i + 1].T * call.scale
        if call.softcap is not None and call.sink_logits is not None:
            products = torch.cat([2.0 * torch.tanh(products / 2.0), call.sink_logits[head, None]])
        weights = products.softmax(-1)
        near = visible(i, spec, None if score is None else score[row, head // 2].tolist())
        far = [j for j in range(i + 1) if j not in near]
        torch.testing.assert_close(found.mass[row, head, i], weights[far].sum(), atol=1e-6, rtol=1e-5)
        output = weights[far] @ call.v[row, head // 2, far]
        torch.testing.assert_close(found.output[row, head, i], output, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("extra", [{}, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("kept", [{}, {"pairs": 3, "mix": 0.5}, {"pairs": 2, "score": "self_recall"}], ids=str)
@torch.no_grad()
def test_near_and_far_together_are_the_teacher(kept: dict[str, Any], extra: dict[str, Any]) -> None:
    """y = (1 - m) near + m far with near as the layer itself computes it, with the pairs that it keeps itself."""
    mixer, call = blend(kept=kept), make_call(**extra)
    near = mixer(call, mode="near_only" if kept else "window_only")[0]
    mass, output = mixer.parts(call).teacher  # type: ignore[attr-defined]
    assert float(mass[:, :, :6].abs().max()) == 0 and float(mass[:, :, 20:].min()) > 0
    torch.testing.assert_close((1 - mass[..., None]) * near + output, teacher_output(call), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [{}, {"pairs": 3}], ids=str)
@torch.no_grad()
def test_texts_of_a_batch_are_what_they_are_alone(kept: dict[str, Any]) -> None:
    mixer, call = blend(kept=kept), make_call(1)

    def errors(part: Call) -> tuple[Tensor, Tensor]:
        parts = mixer.parts(part)
        return parts.direction_error(), parts.share_error()

    def cut(tokens: slice) -> Call:
        heads = {name: getattr(call, name)[:, :, tokens] for name in ("q", "k", "v")}
        assert call.rotation is not None
        rotation = call.rotation._replace(cos=call.rotation.cos[:, tokens], sin=call.rotation.sin[:, tokens])
        return replace(call, **heads, hidden=call.hidden[:, tokens], rotation=rotation)

    place = torch.arange(N)[None]
    packed = errors(replace(call, segments=torch.where(place < 12, 0, torch.where(place < 27, 1, -1))))
    padded = errors(replace(call, padding=place >= 12))
    for tokens in (slice(12), slice(12, 27)):
        for found, alone in zip(packed, errors(cut(tokens)), strict=True):
            torch.testing.assert_close(found[:, tokens], alone, atol=1e-5, rtol=1e-4)
    for found, alone in zip(padded, errors(cut(slice(12, None))), strict=True):
        torch.testing.assert_close(found[:, 12:], alone, atol=1e-5, rtol=1e-4)


def test_errors_are_zero_at_the_teachers_own_parts_and_pull_towards_them() -> None:
    teacher = far_attention(make_call(), group_heads(NearSpec(window=4, sinks=2), None, 2))
    mass = teacher.mass[:, :, 8:].clamp(1e-3, 1 - 1e-3)
    far = (teacher.output[:, :, 8:] / teacher.mass[:, :, 8:, None]).requires_grad_()
    teacher = module.FarAttention(mass, far.detach() * mass[..., None])
    share = mass.logit().requires_grad_()
    right = Parts(teacher, share, far)
    assert float(right.direction_error().detach().max()) < 1e-12
    assert float(right.share_error().detach().abs().max()) < 1e-6
    wrong = Parts(teacher, share + 1, far + 0.5)
    expected = (0.25 * mass.square()).mean(1)
    torch.testing.assert_close(wrong.direction_error().detach(), expected)
    (slope,) = torch.autograd.grad(wrong.share_error().sum(), share)
    assert float(wrong.share_error().detach().min()) > 0 and float(slope.min()) > 0  # a share too large goes down


def test_the_two_errors_have_no_parameter_in_common() -> None:
    mixer = blend()
    parts = mixer.parts(make_call())
    names = {}
    for name, error in (("direction", parts.direction_error()), ("share", parts.share_error())):
        mixer.zero_grad()
        error.sum().backward(retain_graph=True)
        names[name] = {n for n, p in mixer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert names["share"] == {"share.weight", "share.bias"}
    assert names["direction"] == {n for n, _ in mixer.named_parameters()} - names["share"]
