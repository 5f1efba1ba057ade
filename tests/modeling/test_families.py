"""Every family goes through the same hook: conversion, both stages, decoding, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from families import FAMILIES
from lolcats import LolcatsError
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.mixers import softmax
from lolcats.mixers.start import MATCHED_WINDOW_FACTOR, Features, halves
from lolcats.modeling import (
    AttentionCall,
    LinearizedAttention,
    attention_mode,
    check_family,
    linearized_layers,
)
from lolcats.modeling.head import OutputHead
from lolcats.serving.pool import Pool
from lolcats.training import FinetuneStage, TransferStage
from lolcats.training.batches import Batch
from lolcats.training.lora import lora_targets
from lolcats.training.losses import weight_cross_entropy

Builder = Callable[..., Any]
Tokens = Callable[..., Tensor]


MIXES_PACKED_TEXTS = {"opt", "gpt_oss"}
"""Their masks know nothing of positions, in transformers itself: the student sees what its teacher sees."""
ROUTERS = ("gate.", "router.", "shared_expert_gate.")
MLPS = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj")
FUSED_EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss"}  # all MLPs are experts, whose weights are no linear layers


LINEAR = (torch.nn.Linear, Conv1D)
OFTEN = {"llama", "gemma2", "gpt_neox", "deepseek_v3", "gpt_oss"}  # each kind of attention; the others are `slow`


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def teacher(build: Builder, family: str) -> Any:
    return build(family, **FAMILIES[family].settings)


def batch_of(ids: Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)


def is_added(name: str, student: Any) -> bool:
    layers = {n for n, m in student.named_modules() if m in set(linearized_layers(student))}
    return any(name.startswith(f"{n}.mixer.") for n in layers)


@torch.no_grad()
def test_conversion_changes_no_weight_and_only_global_layers(make_student: Builder, teacher: Any, family: str) -> None:
    student = make_student(teacher, window=5, sinks=2)
    assert tuple(layer.layer_idx for layer in linearized_layers(student)) == FAMILIES[family].layers
    own = {n.replace(".inner.", "."): p for n, p in student.named_parameters() if not is_added(n, student)}
    expected = dict(teacher.named_parameters())
    assert own.keys() == expected.keys()
    assert all(torch.equal(p, expected[n]) for n, p in own.items())


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_the_teacher(make_student: Builder, tokens: Tokens, teacher: Any) -> None:
    ids = tokens()
    check = check_family(teacher, ids)
    assert check.ok and len(check.facts) == 9, check
    student, expected = make_student(teacher, window=5, sinks=2), teacher(ids).logits
    assert float((student(ids).logits - expected).abs().max()) > 1e-3, "the oracle sees no difference at all"
    with attention_mode(student, "softmax"):
        torch.testing.assert_close(student(ids).logits, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(make_student(teacher, window=24)(ids).logits, expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_prefill_and_decoding_are_the_full_pass(make_student: Builder, tokens: Tokens, teacher: Any) -> None:
    student, ids = make_student(teacher, window=5, sinks=2), tokens()
    cache = DynamicCache(config=student.config)
    parts = [student(part, past_key_values=cache).logits for part in ids.split([9, 8, *[1] * 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), student(ids).logits, atol=5e-4, rtol=0)


@torch.no_grad()
def test_left_padding_changes_no_generated_token(make_student: Builder, tokens: Tokens, teacher: Any) -> None:
    student, ids = make_student(teacher, window=5, sinks=2), tokens()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    options = {"max_new_tokens": 4, "do_sample": False}
    got = student.generate(padded, attention_mask=(padded > 0).long(), **options)
    assert torch.equal(got[:, 3:], student.generate(ids, **options))


@torch.no_grad()
def test_rows_of_a_pool_are_texts_alone(make_student: Builder, tokens: Tokens, teacher: Any) -> None:
    """Of different lengths, read together or alone, and in the place of another; an idle row beside them."""
    student, ids = make_student(teacher, window=5, sinks=2), tokens(3, 16)
    pool, expected = Pool(student, 3, 32), student(ids).logits
    first, second = pool.read([ids[:1, :4], ids[1:2, :11]]), pool.read([ids[2:, :7]])
    found = [(first.logits[0], 0, 3), (first.logits[1], 1, 10), (second.logits[0], 2, 6)]
    pool.put(0, first, 0)
    pool.put(2, first, 1)
    at = {0: (0, 4), 2: (1, 11)}  # row of the pool: text, and the place of its next token
    for step in range(7):
        if step == 2:  # nothing that is padded gets longer
            pool.put(0, second, 0)
            at[0] = (2, 7)
        if step == 4:  # what is padded gets shorter
            pool.put(2, first, 0)
            at[2] = (0, 4)
        logits = pool.step([int(ids[at[row]]) if row in at else None for row in range(3)])
        found += [(logits[row], *at[row]) for row in at]
        at = {row: (text, place + 1) for row, (text, place) in at.items()}
    for logits, text, place in found:
        torch.testing.assert_close(logits, expected[text, place], atol=5e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "qwen3_next",
            {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
            r"layer 0 .* LinearAttentionLayer.*batch size of 1",
        ),
        ("bart", {"is_decoder": True}, r"BartForCausalLM has positions of its own .*batch size of 1"),
        ("roberta", {"is_decoder": True, "pad_token_id": 2}, r"RobertaForCausalLM has positions .*batch size of 1"),
    ],
    ids=["recurrent layers", "no positions", "positions that begin elsewhere"],
)
@torch.no_grad()
def test_a_pool_of_one_row_holds_what_several_cannot(
    build: Builder, tokens: Tokens, family: str, settings: dict[str, Any], message: str
) -> None:
    model, ids = (
        build("qwen3_next", layer_types=["linear_attention", "full_attention", "linear_attention"]),
        tokens(1, 6),
    )
    with pytest.raises(LolcatsError, match=r"layer 0 .* LinearAttentionLayer.*batch size of 1"):
        Pool(model, 2, 4).read([ids[:, :5]])
    pool = Pool(model, 1, 4)
    for _ in range(2):
        pool.put(0, pool.read([ids[:, :5]]), 0)
        torch.testing.assert_close(pool.step([int(ids[0, 5])])[0], model(ids).logits[0, 5], atol=5e-4, rtol=0)


@torch.no_grad()
def test_packed_texts_are_apart(make_student: Builder, tokens: Tokens, teacher: Any, family: str) -> None:
    student, ids = make_student(teacher, window=4, sinks=2), tokens(1)
    position = torch.cat([torch.arange(11), torch.arange(13)])[None]
    for model in (teacher, student):
        together = model(ids, position_ids=position, use_cache=False).logits
        alone = torch.cat([model(part).logits for part in ids.split([11, 13], 1)], 1)
        difference = float((together - alone).abs().max())
        mixes = family in MIXES_PACKED_TEXTS and (model is teacher or family == "gpt_oss")  # whose local layers stay
        assert difference > 0.1 if mixes else difference < 2e-4


@torch.no_grad()
def test_saved_and_loaded(make_student: Builder, tokens: Tokens, teacher: Any, tmp_path: Any) -> None:
    teacher.save_pretrained(tmp_path / "teacher")  # what was loaded is saved in the form that the files had
    for before in (teacher, AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")):
        check_files(make_student(before, window=5), tokens, tmp_path / "student")


def check_files(student: Any, tokens: Tokens, folder: Any) -> None:
    student.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(student)
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


def test_stage_1_trains_what_was_added(make_student: Builder, tokens: Tokens, teacher: Any) -> None:
    student = make_student(teacher, window=5, sinks=2)
    stage = TransferStage(student, TransferConfig(tokens=48, xent_factor=1.0, compile=False))
    errors = stage.backward(batch_of(tokens()), 1.0)
    assert errors["layers"].isfinite().all()
    for name, parameter in student.named_parameters():
        if not is_added(name, student):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_stage_2_adapts_the_linear_layers(
    make_student: Builder, tokens: Tokens, teacher: Any, family: str, targets: str
) -> None:
    student, ids = make_student(teacher, window=5, sinks=2, decay="gate"), tokens()
    layers = tuple(f"{n}.inner." for n, m in student.named_modules() if m in set(linearized_layers(student)))
    settings: dict[str, Any] = {"tokens": 48, "rank": 2, "targets": targets, "kl_factor": 1.0}
    stage = FinetuneStage(student, FinetuneConfig(**settings))
    stage.backward(batch_of(ids), 1.0)
    adapted = {f"{n}." for n, m in student.named_modules() if hasattr(m, "lora_A")}
    everywhere = {n for n, m in student.named_modules() if n.endswith(MLPS) and hasattr(m, "lora_A")}
    assert bool(everywhere) == (targets == "all" and family not in FUSED_EXPERTS)
    assert targets == "all" or all(name.startswith(layers) for name in adapted)
    assert {next(x for x in layers if n.startswith(x)) for n in adapted if n.startswith(layers)} == set(layers)
    assert not [n for n in adapted if n.endswith(("lm_head.", "embed_out.", "decay_gate.", *ROUTERS)) or "router" in n]
    for name, parameter in stage.parameters().items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert "lora_B" not in name or parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        for name, parameter in stage.parameters().items():
            parameter.add_(0.05 * ("lora_B" in name))
        expected = student(ids).logits
        hidden = student.base_model(ids).last_hidden_state
        torch.testing.assert_close(OutputHead(student)(hidden), expected, atol=1e-5, rtol=0)
        assert stage.finish() is None
        torch.testing.assert_close(student(ids).logits, expected, atol=2e-4, rtol=0)


def reached(student: Any, layer: LinearizedAttention, outputs: list[Tensor]) -> set[str]:
    """Full names of the linear layers of a layer's attention on which what reached its mixer depends."""
    own = {n: m for n, m in student.named_modules() if m in set(layer.inner.modules()) and isinstance(m, LINEAR)}
    weights = [m.weight for m in own.values()]
    sums = torch.stack([x.float().sum() for x in outputs]).sum()
    grads = torch.autograd.grad(sums, weights, allow_unused=True, retain_graph=True)
    return {n for n, grad in zip(own, grads, strict=True) if grad is not None}


def test_no_qk_is_all_but_what_makes_queries_and_keys(
    make_student: Builder, tokens: Tokens, teacher: Any, family: str
) -> None:
    """By what the queries, keys and values that reach a layer depend on, whatever the names are."""
    student = make_student(teacher, window=5)
    calls: list[tuple[LinearizedAttention, AttentionCall]] = []
    for layer in linearized_layers(student):
        layer.observer = lambda layer, call, _: calls.append((layer, call))
    student(tokens(1, 8), use_cache=False)
    makes_qk = {n for layer, call in calls for n in reached(student, layer, [call.q, call.k])}
    makes_v = {n for layer, call in calls for n in reached(student, layer, [call.v])}
    assert len(makes_qk) >= len(calls)
    if makes_qk & makes_v:
        with pytest.raises(
            LolcatsError, match=r"targets no_qk: .* makes keys and values together; use a list"
        ) as error:
            lora_targets(student, "no_qk")
        assert all(name.rpartition(".")[2] in str(error.value) for name in makes_qk & makes_v)
        return
    others = {n for n in set(lora_targets(student, "all")) - set(lora_targets(student, "no_qk")) if ".inner." not in n}
    assert set(lora_targets(student, "no_qk")) == set(lora_targets(student, "all")) - makes_qk - others
    assert {n.rpartition(".")[2] for n in others} <= {n.rpartition(".")[2] for n in makes_qk}


SCORES = ["llama", "gemma2", "gpt_oss", "deepseek_v3"]  # plain, capped, with a learned sink, with small values
Calls = list[tuple[LinearizedAttention, AttentionCall, Tensor]]


@pytest.fixture(params=SCORES)
def calls(request: pytest.FixtureRequest, build: Builder, make_student: Builder, tokens: Tokens) -> Calls:
    """What reaches the attention of each layer with a window of 5, and the softmax output."""
    student = make_student(build(request.param, **FAMILIES[request.param].settings), window=5, sinks=2)
    return request.getfixturevalue("record_calls")(student, tokens())


def teacher_weights(layer: LinearizedAttention, call: AttentionCall, teacher: Tensor) -> Tensor:
    """Attention weights of the softmax, [B, H, 24, 24]: those of a window over the whole text."""
    weights = layer.mixer.widened(24).attention_weights(call)
    values = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
    torch.testing.assert_close(weights @ values, teacher, atol=1e-5, rtol=0)
    return weights


@torch.no_grad()
def test_the_matched_start_sees_the_halves_of_the_layer(calls: Calls) -> None:
    for layer, call, teacher in calls:
        mixer: Any = layer.mixer
        features = Features(mixer.feature_q(call.q), mixer.feature_k(call.k), None)
        found = halves(call, teacher, mixer.settings, features, 1)
        mixer.window_factor.fill_(MATCHED_WINDOW_FACTOR)
        gate, scale = mixer.window_factor.sigmoid()[:, None], mixer.query_scale.exp()[:, None]
        numerator = gate[..., None] * found.near + scale[..., None] * found.far
        out = numerator / (gate * found.near_mass + scale * found.far_mass)[..., None]
        torch.testing.assert_close(out, layer.mixer(call)[0][1, :, 7:], atol=1e-5, rtol=0)
        far = torch.ones(24, 24).tril(-5).index_fill(1, torch.arange(2), 0.0)
        share = (teacher_weights(layer, call, teacher) * far)[1, :, 7:].sum(-1)
        torch.testing.assert_close(found.share, share, atol=1e-5, rtol=0)


@torch.no_grad()
def test_cross_entropy_with_itself_is_the_entropy(calls: Calls) -> None:
    """With a window as long as the text both sides are the teacher's weights."""
    for layer, call, teacher in calls:
        mixer: Any = layer.mixer
        mixer.settings = mixer.settings._replace(window=24)
        weights = teacher_weights(layer, call, teacher)
        entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1).mean()
        torch.testing.assert_close(weight_cross_entropy(mixer, call, None), entropy, atol=1e-5, rtol=0)


@torch.no_grad()
def test_capped_softmax_in_blocks_of_queries(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "QUERY_BLOCK", 5)
    for _, call, teacher in calls:
        out = softmax.capped_softmax(call.q, call.k, call.v, None, call.scale, call.softcap, call.sink_logits)
        torch.testing.assert_close(out, teacher, atol=1e-5, rtol=0)


def test_the_snippet_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    assert float(capsys.readouterr().out) < 1e-4
