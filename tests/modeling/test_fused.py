"""The copy of a model with fewer kernels gives what the model gives, and the model is as it was."""

from __future__ import annotations

import copy
import os
import types
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from decode_cases import SETTINGS, assert_close, eager, forced, with_stand_in
from families import FAMILIES
from lolcats.modeling import fused_prompts, head
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.fused import Fused, FusedMLP, FusedNorm, fused_copy
from lolcats.modeling.fused_rotary import FusedTurn
from lolcats.ops.elementwise import NormForm
from odd_modules import OTHERS, FickleRMSNorm, Gated, TwoRMSNorm

pytest.importorskip("triton")
Builder = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = [
    pytest.mark.usefixtures("no_gradients", "fast_interpreter", "rounding"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels on the CPU, interpreted"),
]
CPU = torch.device("cpu")
LLAMA, OLMO, GEMMA = NormForm(False, True), NormForm(False, False), NormForm(True, False)
EXPECTED: dict[str, tuple[NormForm, int, str | None]] = {
    "llama": (LLAMA, 7, "silu"),
    "mistral": (LLAMA, 7, "silu"),
    "qwen3": (LLAMA, 13, "silu"),
    "olmo2": (OLMO, 13, "silu"),
    "gemma2": (GEMMA, 13, "gelu_tanh"),
    "gemma3_text": (GEMMA, 19, "gelu_tanh"),
    "phi3": (LLAMA, 7, None),
    "qwen3_moe": (LLAMA, 13, None),
}
"""The form of a family's norms, how many there are in three layers, and the activation of its MLPs, if they are fused:
phi3 has gate and up in one product, and experts are no modules of their own."""


def fused_of(copied: nn.Module) -> list[Fused[Any]]:
    return [vars(module)["forward"] for module in copied.modules() if isinstance(vars(module).get("forward"), Fused)]


def fuse(model: nn.Module) -> nn.Module:
    copied = fused_copy(model, CPU)
    assert copied is not None
    return copied


def own_state(model: nn.Module) -> list[dict[str, Any]]:
    """What whoever looks at the modules can see."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", EXPECTED)
def test_families(build: Builder, tokens: Tokens, family: str, dtype: torch.dtype) -> None:
    form, norms, activation = EXPECTED[family]
    model, ids = build(family, **FAMILIES[family].settings).to(dtype), tokens(2, 5)
    for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=torch.Generator().manual_seed(3)) + 0.3)
    want = model(ids).logits
    before, random = own_state(model), torch.get_rng_state()
    copied = fuse(model)
    got = copied(ids).logits
    assert head.relative_error(got, want) <= (1e-5 if dtype == torch.float32 else 0.03)
    assert own_state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    found = [way for fused in fused_of(copied) if isinstance(fused, FusedNorm) for way in fused.found.values()]
    if dtype == torch.float32:  # in which the place of rounding cannot be told
        found, form = [way and way.adds_one for way in found], form.adds_one
    assert found == [form] * norms
    mlps = [fused.found for fused in fused_of(copied) if isinstance(fused, FusedMLP)]
    assert mlps == [{dtype: activation}] * (3 if activation else 0)


def test_only_what_leads_to_fused_modules_is_copied(teacher: Any) -> None:
    copied = cast(Any, fuse(teacher))
    assert type(copied) is type(teacher)
    assert copied.lm_head is teacher.lm_head
    for ours, own in zip(copied.model.layers, teacher.model.layers, strict=True):
        assert ours is not own
        assert ours.self_attn.q_proj is own.self_attn.q_proj
        assert ours.mlp.gate_proj is own.mlp.gate_proj
        assert ours.input_layernorm.weight is own.input_layernorm.weight
        assert isinstance(ours.input_layernorm, type(own.input_layernorm))
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in teacher.parameters()]
    assert copied.state_dict().keys() == teacher.state_dict().keys()


def test_modules_that_are_shared_stay_shared(teacher: Any) -> None:
    teacher.model.layers[2] = teacher.model.layers[0]
    copied = cast(Any, fuse(teacher))
    assert copied.model.layers[2] is copied.model.layers[0] is not teacher.model.layers[0]


def test_what_users_put_on_modules_is_left_alone(teacher: Any, tokens: Tokens) -> None:
    seen: list[str] = []
    first, second, third = teacher.model.layers
    first.input_layernorm.register_forward_hook(lambda *_: seen.append("norm"))
    second.mlp.register_forward_pre_hook(lambda *_: seen.append("mlp"))
    first.mlp.act_fn.register_forward_hook(lambda *_: seen.append("activation"))
    own = third.input_layernorm.forward
    third.input_layernorm.forward = lambda x: (seen.append("patched"), 2 * own(x))[1]
    third.mlp.gate_proj.register_forward_hook(lambda *_: seen.append("gate"))  # which is called as ever
    want = teacher(tokens(1, 4)).logits
    copied = cast(Any, fuse(teacher))
    copied(tokens(1, 4))  # finds forms out, for which modules are called too
    seen.clear()
    assert head.relative_error(copied(tokens(1, 4)).logits, want) <= 1e-5
    assert seen == ["norm", "activation", "mlp", "patched", "gate"]
    assert [type(vars(layer.mlp).get("forward")) for layer in copied.model.layers] == [type(None)] * 2 + [FusedMLP]
    assert len([fused for fused in fused_of(copied) if isinstance(fused, FusedNorm)]) == 5


@pytest.mark.parametrize("name", OTHERS)
def test_other_formulas_are_left_alone(name: str) -> None:
    model, x = nn.Sequential(OTHERS[name]()), torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    copied = fuse(model)
    assert torch.equal(copied(x), model(x))
    assert [fused.found for fused in fused_of(copied)] == [{torch.float32: None}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_of_torch_and_of_users(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(12, 1e-5)
    norm.weight.copy_(torch.linspace(-1, 2, 12))
    model = nn.Sequential(norm, Gated(), Gated(nn.GELU(approximate="tanh"))).to(dtype)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    copied = fuse(model)
    torch.testing.assert_close(copied(x), model(x))
    assert [fused.found[dtype] is not None for fused in fused_of(copied)] == [True] * 3


def test_calls_in_other_ways_are_the_modules_own() -> None:
    norm, x = TwoRMSNorm(), torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cast(Any, fuse(norm))(x, 2), norm(x, 2))
    assert torch.equal(cast(Any, fuse(norm))(x, rows=1), norm(x, 1))
    with pytest.raises(TypeError, match="rows"):
        fuse(norm)(x)
    wide = nn.RMSNorm(12, 1e-6).double()
    assert torch.equal(fuse(wide)(x.double()), wide(x.double()))


def test_there_may_be_nothing_to_fuse(monkeypatch: pytest.MonkeyPatch, teacher: Any) -> None:
    assert fused_copy(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.RMSNorm(3)), CPU) is None  # no epsilon
    monkeypatch.delenv("TRITON_INTERPRET")
    assert fused_copy(teacher, CPU) is None


def test_lora_is_applied(teacher: Any, tokens: Tokens) -> None:
    settings = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    plain = fuse(teacher)(tokens(1, 4)).logits
    adapted = get_peft_model(copy.deepcopy(teacher), cast(Any, settings)).eval()
    copied, want = fuse(adapted), adapted(tokens(1, 4)).logits
    assert head.relative_error(copied(tokens(1, 4)).logits, want) <= 1e-5
    assert head.relative_error(plain, want) > 0.1
    assert [fused.found for fused in fused_of(copied) if isinstance(fused, FusedMLP)] == [{torch.float32: "silu"}] * 3


def recorded(make_student: Builder, teacher: Any = None, **settings: Any) -> Any:
    """A student that decodes by the stand-in, by fused kernels."""
    student = make_student(teacher, **settings)
    student.generation_config.eos_token_id = None
    with_stand_in(student).fuses = True
    return student


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [("llama", "sliding", torch.float32), ("llama", "heads", torch.bfloat16), ("qwen3", "kept", torch.float32)],
    ids=str,
)
def test_recorded_steps_are_fused(
    make_student: Builder, build: Builder, tokens: Tokens, family: str, name: str, dtype: torch.dtype
) -> None:
    """In qwen3 queries and keys have norms: linearized layers are copied too, and the state is still the cache's."""
    student = recorded(make_student, build(family), **SETTINGS[name]).to(dtype)
    ids = tokens(2, 14)
    want = eager(student, lambda: forced(student, ids, 8))
    for replays in (5, 11):
        assert_close(forced(student, ids, 8), want, 1e-5 if dtype == torch.float32 else 0.01)
        assert graphs_of(student).replays == replays
    assert [graph.is_fused for graph in graphs_of(student).recordings] == [True]


def test_fused_steps_that_are_wrong_are_recorded_without(make_student: Builder, tokens: Tokens) -> None:
    student, ids = recorded(make_student, **SETTINGS["sliding"]), tokens(2, 14)
    student.model.norm = FickleRMSNorm(student.model.norm)
    want = eager(student, lambda: forced(student, ids, 8))
    with pytest.warns(UserWarning, match="recorded without fused kernels: the step of fused kernels is off by"):
        assert_close(forced(student, ids, 8), want, 1e-5)
    graphs = graphs_of(student)
    assert [graph.is_fused for graph in graphs.recordings] == [False]
    assert graphs.replays == 5


def test_what_cannot_be_recorded_is_said_once(
    make_student: Builder, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_prompts, "fused_copy", lambda *_: None)
    student, ids = recorded(make_student, **SETTINGS["sliding"]), tokens(2, 14)
    want = eager(student, lambda: forced(student, ids, 8))

    def refuse(_step: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs_of(student).record = refuse
    with pytest.warns(UserWarning) as said:
        assert torch.equal(forced(student, ids, 8), want)
    assert [str(warning.message) for warning in said] == [
        "decoding runs without CUDA graphs, which is slower: operation not permitted when stream is capturing"
    ]


def test_copies_of_a_model_fuse_as_it_does(make_student: Builder) -> None:
    for fuses in (True, False):
        student = recorded(make_student, **SETTINGS["sliding"])
        graphs_of(student).fuses = fuses
        assert graphs_of(copy.deepcopy(student)).fuses == fuses


@pytest.mark.parametrize(("family", "turns"), [("llama", True), ("qwen3", True), ("cohere", False)])
def test_rotary_embedding(build: Builder, tokens: Tokens, family: str, turns: bool) -> None:
    """By halves it is one kernel; of neighbours (Cohere) it stays the family's. Nobody else sees another function."""
    model, ids = build(family, **FAMILIES[family].settings), tokens(2, 5)
    want, before = model(ids).logits, own_state(model)
    copied = fuse(model)
    torch.testing.assert_close(copied(ids).logits, want, rtol=1e-4, atol=1e-4)
    attention = [vars(m)["forward"] for m in copied.modules() if isinstance(vars(m).get("forward"), types.MethodType)]
    assert len(attention) == model.config.num_hidden_layers
    for forward in attention:
        assert set(forward.__func__.__globals__["apply_rotary_pos_emb"].found.values()) == {turns}
        assert not isinstance(type(forward.__self__).forward.__globals__["apply_rotary_pos_emb"], FusedTurn)
    assert own_state(model) == before and torch.equal(model(ids).logits, want)
