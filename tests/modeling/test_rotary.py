"""q and k before rotary embedding: exact for each family, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_half

from families import FAMILIES
from lolcats import LinearizationConfig, LolcatsError, convert
from lolcats.mixers import MIXERS, Call, Rotation
from lolcats.mixers.hybrid import HybridMixer
from lolcats.mixers.rotation import Layout, layouts
from lolcats.modeling.attention import linearized_layers

Builder = Callable[..., Any]
Tokens = Callable[..., Tensor]
NOT_HANDED_OVER = {"gpt2", "opt"}
FLOAT32_ONLY = {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"}
"""Their experts do not run in float64."""


class Watching(HybridMixer):
    """A mixer that keeps what it is called with."""

    needs_rotation: ClassVar[bool] = True
    calls: ClassVar[list[Call]] = []

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(call)
        return super().forward(call, *args, **kwargs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What reaches the mixer of each model that is converted from now on."""
    monkeypatch.setitem(MIXERS, "hybrid", Watching)
    monkeypatch.setattr(Watching, "calls", [])
    return Watching.calls


@pytest.mark.parametrize("family", sorted({*FAMILIES} - NOT_HANDED_OVER))
@torch.no_grad()
def test_what_was_before_depends_on_no_position(build: Builder, tokens: Tokens, calls: list[Call], family: str) -> None:
    """The same text 50 positions further on has other q and k, and the same ones before rotation."""
    dtype = torch.float32 if family in FLOAT32_ONLY else torch.float64
    model = build(family, **FAMILIES[family].settings).to(dtype)
    student, ids = convert(model, LinearizationConfig(window=64)), tokens(2, 12)
    calls.clear()
    position = torch.arange(12)[None].expand(2, -1)
    for shift in (0, 50):
        student(ids, position_ids=position + shift, use_cache=False)
    count = len(calls) // 2
    # The families' angles are float32, so those of positions 50 further on are not quite the same.
    limit = {"rtol": 0, "atol": 1e-5 if dtype == torch.float64 else 2e-3}
    rotated = False
    for near, far in zip(calls[:count], calls[count:], strict=True):
        assert near.rotation is not None
        for x, y, before, after in zip(
            near.unrotated(), far.unrotated(), (near.q, near.k), (far.q, far.k), strict=True
        ):
            torch.testing.assert_close(x, y, **limit)
            torch.testing.assert_close(near.rotation.apply(x), before, rtol=0, atol=1e-6)
            rotated = rotated or float((before - after).abs().max()) > 0.1
    assert rotated or family == "cohere2", "nothing was turned"  # whose global layers have no rotary embedding
    layout = {layer.rotary.layout for layer in linearized_layers(student)}
    assert None not in layout


@pytest.mark.parametrize("family", sorted({*FAMILIES} - NOT_HANDED_OVER))
@torch.no_grad()
def test_how_far_a_model_looks_back(build: Builder, tokens: Tokens, calls: list[Call], family: str) -> None:
    """The angles at the last position of the context are those that the family makes there."""
    model = build(family, **FAMILIES[family].settings)
    limit = model.config.get_text_config().max_position_embeddings
    student = convert(model, LinearizationConfig(window=64))
    calls.clear()
    student(tokens(1, 8), position_ids=torch.arange(limit - 8, limit)[None], use_cache=False)
    assert calls
    for call in calls:
        assert call.rotation is not None
        if call.rotation.layout.pairs == "none":
            continue
        assert call.reach is not None and call.reach.tokens == limit
        capped = call.reach.capped(call.q, call.rotation)
        torch.testing.assert_close(capped[:, :, -1], call.q[:, :, -1], rtol=0, atol=5e-3)
        assert float((capped - call.q)[:, :, 0].abs().max()) > 0.02


@torch.no_grad()
def test_angles_that_depend_on_the_text(build: Builder, tokens: Tokens, calls: list[Call]) -> None:
    """Nothing is known then of what the last position would be."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    student = convert(build("llama", rope_parameters=rope), LinearizationConfig(window=64))
    calls.clear()
    student(tokens(1, 8), use_cache=False)
    assert calls and all(call.reach is None for call in calls)


@pytest.mark.parametrize("family", ["llama", "glm4", "phi"])
@torch.no_grad()
def test_they_are_linear_in_the_hidden_state(build: Builder, tokens: Tokens, calls: list[Call], family: str) -> None:
    """They are what the family's projections give, up to nothing at all."""
    model = build(family, **FAMILIES[family].settings).double()
    student = convert(model, LinearizationConfig(window=4))
    calls.clear()
    student(tokens(2, 12), use_cache=False)
    for layer, call in zip(linearized_layers(student), calls, strict=True):
        inner: Any = layer.inner
        for x, projection in zip(call.unrotated(), (inner.q_proj, inner.k_proj), strict=True):
            expected = projection(call.hidden).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_in_bfloat16_with_a_cache_and_padding(build: Builder, tokens: Tokens, calls: list[Call]) -> None:
    student = convert(build("cohere").bfloat16(), LinearizationConfig(window=4))
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    calls.clear()
    cache = DynamicCache(config=student.config)
    student(ids, attention_mask=mask, past_key_values=cache)
    student(ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], 1), past_key_values=cache)
    for call in calls:
        q, k = call.unrotated()
        assert q.dtype == k.dtype == torch.bfloat16 and q.shape == call.q.shape
        assert call.rotation is not None
        torch.testing.assert_close(call.rotation.apply(q), call.q, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("family", sorted(NOT_HANDED_OVER))
def test_no_rotary_embedding_at_hand_is_refused_before_anything_changes(
    build: Builder, calls: list[Call], family: str
) -> None:
    model = build(family, **FAMILIES[family].settings)
    with pytest.raises(LolcatsError, match=r"is given no rotary embeddings \(position_embeddings\)"):
        convert(model, LinearizationConfig())
    assert not linearized_layers(model) and not calls
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    assert not [h for h in hooks if h.__module__.startswith("lolcats")]


def test_what_cannot_be_undone_is_refused(build: Builder, calls: list[Call]) -> None:
    """A norm with weights behind the rotation, complex angles, and angles with several axes."""
    with pytest.raises(LolcatsError, match=r"HunYuan\w+ cannot be undone: .* layouts is off by"):
        model = build("hunyuan_v1_dense")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.query_layernorm.weight.uniform_(0.2, 2)
                layer.self_attn.key_layernorm.weight.uniform_(0.2, 2)
        convert(model, LinearizationConfig())
    with pytest.raises(LolcatsError, match=r"of another form: expected cosines and sines"):
        convert(build("llama4_text", layer_types=["full_attention"] * 3), LinearizationConfig())


def test_a_call_without_its_rotation_says_so() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(LolcatsError, match="needs_rotation"):
        Call(x, x, x, x, 1.0).unrotated()


ANGLES = torch.linspace(0.1, 40, 2 * 7 * 3, dtype=torch.float64).view(2, 7, 3)  # [B, N, R/2]


@pytest.mark.parametrize("rotate", [rotate_half, rotate_interleaved])
def test_both_ways_are_those_of_transformers(rotate: Any) -> None:
    q = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = q[:, :2] * 0.5
    angles = torch.cat([ANGLES, ANGLES], -1) if rotate is rotate_half else ANGLES.repeat_interleave(2, -1)
    layout = Layout("half") if rotate is rotate_half else Layout("interleaved", angles="repeat")
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3  # with a scale, as long contexts have it
    if rotate is rotate_interleaved:  # which works in float32
        q, k, cos, sin = q.float(), k.float(), cos.float(), sin.float()
    for x, turned in zip((q, k), rotate(q, k, cos, sin), strict=True):
        rotation = Rotation(cos, sin, layout)
        torch.testing.assert_close(rotation.apply(x), turned)
        torch.testing.assert_close(rotation.undo(turned), x)


@pytest.mark.parametrize("layout", layouts(4, 10), ids=str)
def test_a_part_of_a_head(layout: Layout) -> None:
    """Turned and turned back is the same; what is not rotated passes; lengths of pairs stay."""
    x = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = Rotation(angles.cos(), angles.sin(), layout)
    turned = rotation.apply(x)
    torch.testing.assert_close(rotation.undo(turned), x)
    changed = ((turned - x).abs().amax((0, 1, 2)) > 0).tolist()
    count = {"none": 0}.get(layout.pairs, 8 if layout.angles == "single" else 4)
    assert changed == ([True] * count + [False] * (10 - count))[:: 1 if layout.place == "first" else -1]
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_layouts_that_are_the_same_are_named_once() -> None:
    assert len(layouts(4, 10)) == 13
    assert layouts(2, 2) == [Layout("none"), Layout("half")]
    assert {layout.place for layout in layouts(6, 6)} == {"first"}
    assert layouts(64, 8) == [Layout("none")]
