"""What every mixer promises (`lolcats.mixers.base`), over each that is registered and a few settings of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lolcats.config import LinearizationConfig, TransferConfig
from lolcats.mixers import MIXERS, Call, Mixer, Rotation, Sizes, StateSpec, build_mixer, map_state, state_tensors
from lolcats.mixers.rotation import Layout, Reach
from lolcats.modeling.attention import added_parameters
from lolcats.training import TransferStage
from lolcats.training.batches import Batch

SIZES = Sizes(heads=4, kv_heads=2, head_dim=6, value_dim=4, hidden_size=10)
TABLE: dict[str, list[dict[str, Any]]] = {
    "hybrid": [
        {"window": 4, "fold": 3},
        {"window": 2, "decay": "gate", "fold": 4},
        {"window": 3, "window_kind": "terraced", "sinks": 2, "decay": "gate", "state_heads": "kv"},
        {"window": 0, "feature_map": "t2r", "feature_size": 3, "fold": 2},
        {"window": 5, "sinks": 1, "feature_map": "elu"},
    ],
    "blend": [
        {"window": 4, "sinks": 2, "kept": {"pairs": 3, "mix": 0.5, "recall_error": True}},
        {"window": 3, "far": "none", "kept": {"pairs": 2, "fade": 50}},
        {"window": 4, "sinks": 1, "far": "none", "kept": {"pairs": 3}, "bits": 8},
        {"window": 5, "kept": {"pairs": 2, "score": "self_recall"}, "state_heads": "query", "decay": "fixed"},
        {"window": 2, "sinks": 1, "kept": {"pairs": 4, "score": "random"}, "decay": "none", "rotate_far": True},
        *({"window": 3, "far": far} for far in ("simple_gla", "mamba2", "gla", "hgrn2", "delta", "gated_delta", "kda")),
        {"window": 1, "feature_map": "elu", "kept": {"pairs": 2, "score": "recency"}},
        {"window": 2, "far": "gated_delta", "state_dtype": "bfloat16"},
        {"sinks": 1, "kept": {"recall_error": True}, "split": [[[4, 3], [2, 0]]] * 3},
        {"sinks": 2, "far": "none", "bits": 4, "split": [[[3, 1], [5, 4]]] * 3},
        {"far": "none", "bits": 8, "kept": {"score": "random"}, "split": [[[6, 2], [2, 2]]] * 3},
        {"far": "none", "kept": {"pairs": 2}, "split": [[4, 3], [[1, 0], [6, 2]], [2, 0]]},
    ],
}
"""Tiny settings of each mixer."""
assert TABLE.keys() == MIXERS.keys()
CASES = [pytest.param(name, settings, id=f"{name}-{settings}") for name, all_ in TABLE.items() for settings in all_]
REACH = 12
"""Tokens of the model's context, fewer than those of most texts."""
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def make(name: str, settings: dict[str, Any], move: float = 0.3) -> Mixer:
    """A mixer in float64, its parameters away from their start."""
    values = LinearizationConfig(mixer=name, **settings).values()
    torch.manual_seed(0)  # networks start at random
    mixer = build_mixer(name, SIZES, **values).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * move)
    return mixer


def make_call(rows: int = 2, tokens: int = 17, dtype: torch.dtype = torch.float64, seed: int = 0) -> Call:
    """Tokens of random texts."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype)

    s = SIZES
    q, k = random(s.heads, tokens, s.head_dim), random(s.kv_heads, tokens, s.head_dim)
    v, hidden = random(s.kv_heads, tokens, s.value_dim), random(tokens, s.hidden_size)
    angles = random(tokens, s.head_dim)
    rotation = Rotation(angles.cos(), angles.sin(), Layout("half"))
    last = torch.linspace(0, 3, s.head_dim)[None, None].double()
    reach = Reach(REACH, Rotation(last.cos(), last.sin(), Layout("half")))
    return Call(q, k, v, hidden, s.head_dim**-0.5, rotation=rotation, reach=reach)


def part(call: Call, tokens: slice | Tensor, rows: slice | Tensor = slice(None)) -> Call:
    """Some tokens of some rows."""
    heads = [x[rows][:, :, tokens] for x in (call.q, call.k, call.v)]
    flat = [None if x is None else x[rows][:, tokens] for x in (call.hidden, call.padding, call.segments)]
    assert call.rotation is not None and flat[0] is not None
    cos, sin = (x[rows][:, tokens] for x in call.rotation[:2])
    rotation = call.rotation._replace(cos=cos, sin=sin)
    return replace(
        call, q=heads[0], k=heads[1], v=heads[2], hidden=flat[0], padding=flat[1], segments=flat[2], rotation=rotation
    )


def softmax_output(call: Call) -> Tensor:
    """What the teacher gives."""
    k, v = (x.repeat_interleave(2, 1) for x in (call.k, call.v))
    n = call.q.shape[2]
    scores = (call.q @ k.mT * call.scale).masked_fill(torch.ones(n, n).tril() == 0, -torch.inf)
    return scores.softmax(-1) @ v


def same_states(mixer: Mixer, x: Any, y: Any) -> None:
    """Both stand for as many tokens, and the same tokens make the same of both; unused places may hold anything."""
    assert x.length.tolist() == y.length.tolist() and StateSpec.of(x) == StateSpec.of(y)
    later = make_call(len(x.length), 9, seed=11)
    torch.testing.assert_close(mixer(later, copied(x))[0], mixer(later, copied(y))[0], **EXACT)


def copied(state: Any) -> Any:
    """A step may write over the state that it is given."""
    return map_state(state, Tensor.clone)


pytestmark = pytest.mark.parametrize(("name", "settings"), CASES)


@pytest.mark.slow
@torch.no_grad()
def test_a_text_may_be_cut_anywhere(name: str, settings: dict[str, Any]) -> None:
    mixer, call = make(name, settings), make_call()
    for mode in mixer.modes:
        out, state = mixer(call, keep=True, mode=mode)
        assert mixer(call, mode=mode)[1] is None
        torch.testing.assert_close(mixer(call, mode=mode)[0], out, **EXACT)
        for cut in range(1, 17):
            first, between = mixer(part(call, slice(cut)), keep=True, mode=mode)
            second, last = mixer(part(call, slice(cut, None)), copied(between), keep=True, mode=mode)
            torch.testing.assert_close(torch.cat([first, second], 2), out, **EXACT)
            same_states(mixer, last, state)
            torch.testing.assert_close(mixer(part(call, slice(cut, None)), between, mode=mode)[0], second, **EXACT)


@torch.no_grad()
def test_steps_are_the_prefill(name: str, settings: dict[str, Any]) -> None:
    mixer, call = make(name, settings), make_call()
    for mode in mixer.modes:
        out, end = mixer(call, keep=True, mode=mode)
        state = mixer.empty_state(2, torch.float64)
        for i in range(17):
            step, state = mixer.step(part(call, slice(i, i + 1)), state, mode=mode)
            torch.testing.assert_close(step, out[:, :, i : i + 1], **EXACT)
        same_states(mixer, state, end)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(name: str, settings: dict[str, Any], side: str) -> None:
    mixer, call = make(name, settings), make_call()
    real = torch.ones(2, 17, dtype=torch.bool)
    own = slice(3, None) if side == "left" else slice(0, 14)
    real[1] = False
    real[1, own] = True
    padded = replace(call, padding=real)
    out, state = mixer(padded, keep=True)
    for row, tokens in ((0, slice(None)), (1, own)):
        alone, end = mixer(part(call, tokens, slice(row, row + 1)), keep=True)
        torch.testing.assert_close(out[row : row + 1][:, :, tokens], alone, **EXACT)
        same_states(mixer, map_state(state, lambda t, row=row: t[row : row + 1]), end)
    assert not out[1][:, ~real[1]].any()
    assert state.length.tolist() == [17, 14]
    skipped = replace(part(make_call(seed=5), slice(1)), padding=torch.tensor([[True], [False]]))
    step, after = mixer.step(skipped, copied(state))
    assert not step[1].any() and after.length.tolist() == [18, 14]
    same_states(mixer, map_state(after, lambda t: t[1:]), map_state(state, lambda t: t[1:]))


@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(name: str, settings: dict[str, Any]) -> None:
    mixer, call = make(name, settings), make_call(rows=3)
    out, state = mixer(call, keep=True)
    for row in range(3):
        alone, end = mixer(part(call, slice(None), slice(row, row + 1)), keep=True)
        torch.testing.assert_close(out[row : row + 1], alone, **EXACT)
        same_states(mixer, map_state(state, lambda t, row=row: t[row : row + 1]), end)


@torch.no_grad()
def test_packed_texts_are_separate_texts(name: str, settings: dict[str, Any]) -> None:
    """The state that is kept is that of the last text of each row."""
    mixer, call = make(name, settings), make_call()
    segments = torch.tensor([[0] * 6 + [1] * 7 + [-1] * 4, [4] * 3 + [5] + [9] * 13])
    packed = replace(call, segments=segments)
    whole = mixer(packed)[0]
    out, state = mixer(packed, keep=True)
    torch.testing.assert_close(out, whole, **EXACT)
    for row, texts in ((0, (slice(6), slice(6, 13))), (1, (slice(3), slice(3, 4), slice(4, 17)))):
        end = None
        for text in texts:
            alone, end = mixer(part(call, text, slice(row, row + 1)), keep=True)
            torch.testing.assert_close(out[row : row + 1][:, :, text], alone, **EXACT)
        same_states(mixer, map_state(state, lambda t, row=row: t[row : row + 1]), end)
    assert not out[0][:, 13:].any()


@torch.no_grad()
def test_nothing_comes_from_the_future(name: str, settings: dict[str, Any]) -> None:
    mixer, call = make(name, settings), make_call()
    other = make_call(seed=7)
    mixed = {n: torch.cat([getattr(call, n)[:, :, :9], getattr(other, n)[:, :, 9:]], 2) for n in ("q", "k", "v")}
    hidden = torch.cat([call.hidden[:, :9], other.hidden[:, 9:]], 1)
    changed = replace(call, hidden=hidden, **mixed)
    for mode in mixer.modes:
        before, after = mixer(call, mode=mode)[0], mixer(changed, mode=mode)[0]
        torch.testing.assert_close(after[:, :, :9], before[:, :, :9], **EXACT)
        assert mode != "full" or float((after - before)[:, :, 9:].abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_state_is_what_it_says_however_long_the_text(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    mixer = make(name, settings).to(torch.float64 if dtype == torch.float64 else torch.float32)
    spec = mixer.state_spec(dtype)
    assert StateSpec.of(mixer.empty_state(3, dtype)) == spec
    assert mixer.to_empty(device="meta").state_spec(dtype) == spec, "sizes are told of models without weights"
    mixer = make(name, settings).to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert spec.nbytes > 0 and len(set(spec.names)) == len(spec.names) == len(spec.shapes) == len(spec.dtypes)
    for tokens in (1, 3, 40):
        state = mixer(make_call(tokens=tokens, dtype=dtype), keep=True)[1]
        assert StateSpec.of(state) == spec
        assert all(t.shape[0] == 2 for t in state_tensors(state)) and state.length.tolist() == [tokens] * 2
        assert StateSpec.of(mixer.step(make_call(tokens=1, dtype=dtype), state)[1]) == spec
    assert sum(t.numel() * t.element_size() for t in state_tensors(state)) == 2 * spec.nbytes


@torch.no_grad()
def test_sums_are_float32_in_bfloat16(name: str, settings: dict[str, Any]) -> None:
    """The error is that of rounding the output, however long the text: at once, in parts and in steps."""
    if settings.get("bits", 16) < 16:
        pytest.skip("a number between two steps may be rounded to either, which costs more than rounding the output")
    mixer = make(name, settings)
    call = make_call(1, 300, torch.bfloat16)
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double(), hidden=call.hidden.double())
    expected = mixer(exact)[0]
    mixer = mixer.float()
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        out, state = mixer(part(call, slice(280)), keep=True)
        outs = [out]
        for i in range(280, 300):
            step, state = mixer.step(part(call, slice(i, i + 1)), state)
            outs.append(step)
    error = (torch.cat(outs, 2).double() - expected).abs().max() / expected.abs().max()
    assert float(error) < (2**-6 if settings.get("state_dtype") == "bfloat16" else 2**-7)


def test_the_start_is_finite_and_so_are_its_gradients(name: str, settings: dict[str, Any]) -> None:
    mixer, call = make(name, settings, move=0.0).float(), make_call(dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in mixer.parameters())
    scores = (call.q @ call.k.repeat_interleave(2, 1).mT * call.scale).masked_fill(
        ~torch.ones(17, 17).tril().bool(), -torch.inf
    )
    teacher = scores.softmax(-1) @ call.v.repeat_interleave(2, 1)
    for begin in (lambda: None, lambda: mixer.start(call, teacher)):
        begin()
        assert all(bool(p.isfinite().all()) for p in mixer.parameters())
        for target in mixer.targets:
            mixer.zero_grad()
            out = mixer.target_output(call, target)
            assert out.isfinite().all()
            if not out.requires_grad:  # a window has nothing to learn
                return
            (out - teacher).square().mean().backward()
            assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in mixer.parameters())
        assert any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in mixer.parameters())


@torch.no_grad()
def test_each_mode_is_defined_and_is_another(name: str, settings: dict[str, Any]) -> None:
    mixer, call = make(name, settings), make_call()
    outputs = {mode: mixer(call, mode=mode)[0] for mode in mixer.modes}
    for out in outputs.values():
        assert out.shape == (2, SIZES.heads, 17, SIZES.value_dim) and out.dtype == call.v.dtype and out.isfinite().all()
    for mode in mixer.modes[1:]:
        same = settings.get("window") == 0 and mode == "linear_only"  # there is nothing else
        assert torch.allclose(outputs[mode], outputs["full"]) == same, mode
    torch.testing.assert_close(mixer.target_output(call, "full"), outputs["full"], **EXACT)


@torch.no_grad()
def test_a_widened_layer_is_softmax_attention(name: str, settings: dict[str, Any]) -> None:
    """What the self-check rests on; the layer itself stays as it is."""
    mixer, call = make(name, settings), replace(make_call(), reach=None)  # within the context of the model
    before = mixer(call)[0]
    wide = mixer.widened(17)
    torch.testing.assert_close(wide(call)[0], softmax_output(call), **EXACT)
    assert {*wide.parameters()} == {*mixer.parameters()}
    assert torch.equal(mixer(call)[0], before)


@torch.no_grad()
def test_slots_are_rows_of_a_pool(name: str, settings: dict[str, Any]) -> None:
    """Two texts are stepped in place, in an order of their own; the others stay."""
    mixer, prompt = make(name, settings), make_call(rows=5, tokens=9)
    token, slots = make_call(rows=2, tokens=1, seed=3), torch.tensor([3, 1])
    pool = copied(mixer(prompt, keep=True)[1])
    before, tensors = copied(pool), state_tensors(pool)
    expected, rows = mixer.step(token, map_state(copied(pool), lambda t: t[slots]))
    out, after = mixer.step(token, pool, slots=slots)
    torch.testing.assert_close(out, expected, **EXACT)
    assert all(x is y for x, y in zip(state_tensors(after), tensors, strict=True)), "not in place"
    same_states(mixer, map_state(after, lambda t: t[slots]), rows)
    for x, y in zip(state_tensors(after), state_tensors(before), strict=True):
        assert torch.equal(x[[0, 2, 4]], y[[0, 2, 4]])
    assert after.length.tolist() == [9, 10, 9, 10, 9]
    new = mixer.step(token, mixer.empty_state(5, torch.float64), slots=slots)[1]
    assert new.length.tolist() == [0, 1, 0, 1, 0]


@torch.no_grad()
def test_a_slot_of_minus_one_is_a_row_without_a_text(name: str, settings: dict[str, Any]) -> None:
    """As an engine pads its batches; rows lie apart, as in its pages."""
    mixer, prompt = make(name, settings), make_call(rows=4, tokens=9)
    pool = map_state(mixer(prompt, keep=True)[1], lambda t: torch.stack([t, t], 1)[:, 0])
    before, token = copied(pool), make_call(rows=3, tokens=1, seed=3)
    expected, rows = mixer.step(part(token, slice(None), slice(1, 2)), map_state(copied(pool), lambda t: t[[2]]))
    out, _ = mixer.step(token, pool, slots=torch.tensor([-1, 2, -1]))
    torch.testing.assert_close(out[1:2], expected, **EXACT)
    same_states(mixer, map_state(pool, lambda t: t[[2]]), rows)
    mixer.step(token, pool, slots=torch.tensor([-1, -1, -1]))
    for x, y in zip(state_tensors(pool), state_tensors(before), strict=True):
        assert torch.equal(x[[0, 1, 3]], y[[0, 1, 3]])
    assert pool.length.tolist() == [9, 9, 10, 9]


def test_gradients_are_those_of_the_function(name: str, settings: dict[str, Any]) -> None:
    if settings.get("bits", 16) < 16:
        pytest.skip("rounding has no derivative: its gradient is that of no rounding")
    mixer, call = make(name, settings), make_call(1, 8)
    names = [n for n, _ in mixer.named_parameters()]
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v, call.hidden)]

    def run(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, *values: Tensor) -> Tensor:
        made = replace(call, q=q, k=k, v=v, hidden=hidden)
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (made,))[0]

    assert torch.autograd.gradcheck(run, (*leaves, *mixer.parameters()), fast_mode=True)


def test_stage_1_reaches_the_mixer_alone(
    name: str, settings: dict[str, Any], make_student: Callable[..., Any], tokens: Callable[..., Tensor]
) -> None:
    student, ids = make_student(mixer=name, **settings), tokens()
    if not added_parameters(student):
        pytest.skip("nothing in it learns")
    stage = TransferStage(student, TransferConfig(tokens=48, compile=False))
    stage.backward(Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None), 1.0)
    added = added_parameters(student)
    assert {n for n, p in student.named_parameters() if "mixer" in n.split(".")} == added.keys()
    for parameter_name, p in student.named_parameters():
        assert (p.grad is not None) == (parameter_name in added) == p.requires_grad, parameter_name


def test_stage_1_reaches_all_of_it_where_texts_are_packed(
    name: str, settings: dict[str, Any], make_student: Callable[..., Any], tokens: Callable[..., Tensor]
) -> None:
    """What learns from one text alone, as a learned score does, learns from one of these."""
    student, ids = make_student(mixer=name, **settings), tokens()
    if not added_parameters(student):
        pytest.skip("nothing in it learns")
    documents = torch.tensor([[0] * 5 + [1] * 19, [0] * 20 + [-1] * 4])
    index = torch.arange(24).expand(2, -1)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), documents, torch.where(documents == 1, index - 5, index))
    stage = TransferStage(student, TransferConfig(tokens=48, compile=False))
    stage.backward(batch, 1.0)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in stage.parameters().values())


@torch.no_grad()
def test_saved_and_loaded_is_the_same(
    name: str,
    settings: dict[str, Any],
    make_student: Callable[..., Any],
    tokens: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    student = make_student(mixer=name, **settings)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.linearization == student.config.linearization
    assert loaded.config.linearization["mixer"] == name
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


@torch.no_grad()
def test_inside_is_the_layer(name: str, settings: dict[str, Any]) -> None:
    """Weights that are read off for other values are those with which the layer sums its own."""
    mixer, call = make(name, settings), make_call(tokens=23)
    inside, identity = mixer.inside(call), torch.eye(23).double().expand(2, 2, 23, 23)
    codec = getattr(mixer, "codec", None)
    stored = call.v if codec is None else codec.coded(call.k, call.v, False).v
    near = inside.near(identity)
    far = torch.zeros_like(near) if inside.far is None else inside.far(identity)
    output = near @ stored.repeat_interleave(2, 1) + far @ call.v.repeat_interleave(2, 1)
    torch.testing.assert_close(output, mixer(call)[0], **EXACT)
    torch.testing.assert_close(inside.total(identity), near + far, **EXACT)
    assert not (near + far).triu(1).any()
    if settings.get("far", "linear") in ("linear", "none") and "feature_map" not in settings:  # the others are no means
        torch.testing.assert_close((near + far).sum(-1), torch.ones(2, 4, 23).double(), **EXACT)
    for part in (inside.share, inside.decay):
        assert part is None or (part.shape == (2, 4, 23) and bool(((part > 0) & (part < 1)).all()))
    assert (inside.keep is not None) == any("kept" in part for part in mixer.state_spec(torch.float64).names)
