"""Layers and key heads that share the memory of a uniform setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from lolcats import LolcatsError
from lolcats.config import LinearizationConfig
from lolcats.evaluation.memory import text_memory
from lolcats.modeling import attention_mode, convert, linearized_layers, state_bytes
from lolcats.modeling.budget import find_split
from lolcats.modeling.spread import Taker, spread_bytes

Tokens = Callable[..., Tensor]
KEPT = {"pairs": 5, "score": "oracle"}
UNIFORM: dict[str, Any] = {"mixer": "blend", "far": "none", "window": 6, "sinks": 1, "kept": KEPT}


def sizes_of(model: Any) -> list[list[tuple[int, int]]]:
    """(window, pairs) of each key head of each layer, as its mixer has them."""
    found = []
    for layer in linearized_layers(model):
        mixer: Any = layer.mixer
        by_head = {head: group.spec for group in mixer.groups for head in group.heads}
        found.append([(by_head[head].window, by_head[head].pairs) for head in sorted(by_head)])
    return found


def output_error(model: Any, ids: Tensor, exact: Tensor) -> float:
    """Divergence of a model's predictions from the teacher's."""
    with torch.no_grad():
        got = model(ids, use_cache=False).logits.log_softmax(-1)
    return float((exact.exp() * (exact - got)).sum(-1).mean())


@pytest.mark.parametrize("kept", [KEPT, {"pairs": 0}], ids=["pairs", "window"])
@pytest.mark.parametrize("budget", ["layers", "heads"])
def test_the_split_takes_no_more_bytes_and_is_nearer_to_the_teacher(
    teacher: LlamaForCausalLM, tokens: Tokens, budget: str, kept: dict[str, Any]
) -> None:
    ids, settings = tokens(3, 60, 5), UNIFORM | {"kept": kept}
    with torch.no_grad():
        exact = teacher(tokens(3, 60, 5)).logits.log_softmax(-1)
    uniform = convert(copy.deepcopy(teacher), LinearizationConfig(**settings))
    shared = convert(copy.deepcopy(teacher), LinearizationConfig(**settings, budget=budget), input_ids=ids)
    memory = [text_memory(model) for model in (uniform, shared)]
    assert memory[0] is not None and memory[1] is not None
    pair = 2 * 6 * 4 + 4
    # Less than a pair of each taker is left over, and of heads the lengths of groups that were not needed.
    assert 0 <= memory[0].bytes - memory[1].bytes < pair * (6 if budget == "heads" else 2)
    sizes = sizes_of(shared)
    assert len({size for layer in sizes for size in layer}) > 1
    assert budget == "heads" or all(len(set(layer)) == 1 for layer in sizes)
    assert any(pairs for layer in sizes for _, pairs in layer) == bool(kept["pairs"])
    assert output_error(shared, ids, exact) < output_error(uniform, ids, exact)


def test_the_search_leaves_no_trace(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    teacher.lm_head.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in teacher.named_parameters()}
    student = convert(teacher, LinearizationConfig(**UNIFORM, budget="heads"), input_ids=tokens(2, 40))
    assert all(layer.observer is None for layer in linearized_layers(student))
    for name, p in student.named_parameters():
        if "mixer" not in name:
            value, trained = before[name.replace(".inner.", ".")]
            assert torch.equal(p, value) and p.grad is None and p.requires_grad == trained
    assert (
        find_split(student, LinearizationConfig(**UNIFORM, budget="heads"), tokens(2, 40))
        == (
            student.config.linearization["split"]  # type: ignore[attr-defined]
        )
    ), "the same text gives the same split"


def test_only_the_oracle_knows_which_pairs_are_the_best(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    """Other scores err; their errors are the same whatever was drawn before, and nothing else is drawn by them."""
    splits = {}
    for score in ("oracle", "learned", "random"):
        config = LinearizationConfig(**UNIFORM | {"kept": KEPT | {"score": score}}, budget="heads")
        for seed in (0, 1):
            torch.manual_seed(seed)
            student = convert(copy.deepcopy(teacher), config, input_ids=tokens(3, 60, 5))
            splits[score, seed] = student.config.linearization["split"]
    assert splits["oracle", 0] == splits["oracle", 1] != splits["learned", 0] == splits["learned", 1]
    assert splits["random", 0] == splits["learned", 0]


def test_saved_with_its_split(teacher: LlamaForCausalLM, tokens: Tokens, tmp_path: Path) -> None:
    settings = UNIFORM | {"kept": {"pairs": 5, "score": "random"}}
    student: Any = convert(teacher, LinearizationConfig(**settings, budget="heads"), input_ids=tokens(3, 60, 5))
    student.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert sizes_of(loaded) == sizes_of(student) and loaded.config.linearization["budget"] == "heads"
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(loaded.config)
    assert text_memory(empty, torch.float32) == text_memory(student)
    ids = tokens(2, 40)
    torch.testing.assert_close(loaded(ids).logits, student(ids).logits)
    torch.testing.assert_close(loaded.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False)[:, :40], ids)


def test_the_window_of_the_same_memory_is_uniform(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    split = [[[2, 0], [9, 3]], [4, 0], [[20, 1], [1, 6]]]
    student = convert(teacher, LinearizationConfig(**UNIFORM, split=split))
    cache, ids = DynamicCache(config=student.config), tokens(1, 60)
    with attention_mode(student, "equal_window"), torch.no_grad():
        student(ids, past_key_values=cache, use_cache=True)
    lengths = {layer.state.near.ring.k.shape[2] for layer in cache.layers}  # type: ignore[attr-defined]
    budget = text_memory(student)
    assert budget is not None and len(lengths) == 1
    token = sum(layer.kv_token_bytes for layer in budget.layers)
    assert state_bytes(cache) <= budget.bytes < state_bytes(cache) + token


def split_with(entry: Any) -> Any:
    return [[4, 1], entry, [4, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": [[4, 1]] * 2}, r"linearization.split: expected an entry for each of 3 linearized layers; got 2"),
        ({"split": split_with([[4, 1]] * 3)}, r"split, layer 1: expected \[window, pairs\] for 2 key heads; got 3"),
        ({"kept": {"pairs": 4000}}, r"at most 2,048 kept pairs, .* got 4,000"),
        ({"split": split_with([[4, 1], [4, 2049]])}, r"at most 2,048 kept pairs, .* got 2,049"),
        ({"budget": "layers"}, r"budget='layers' needs a batch of real text"),
    ],
)
def test_what_a_model_refuses(teacher: LlamaForCausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LolcatsError, match=message):
        convert(teacher, LinearizationConfig(**(UNIFORM | settings)))
    assert type(teacher) is LlamaForCausalLM


def test_a_gradient_that_is_not_finite_is_named_with_its_layer(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    broken: Any = teacher.model.layers[2].self_attn
    with torch.no_grad():
        broken.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(LolcatsError, match="not finite"):
        convert(teacher, LinearizationConfig(**UNIFORM, budget="heads"), input_ids=tokens(1, 20))


def test_bytes_go_where_they_bring_most() -> None:
    """Three takers of 10 bytes a token; the hull leaves out a size that is no step on the way."""

    def taker(scale: float) -> Taker:
        return Taker({(w, 0): scale / w if w != 4 else scale for w in (1, 2, 4, 8)}, lambda size: 10 * sum(size))

    takers = [taker(0.5), taker(8.0), taker(0.0)]
    for total in range(30, 400, 7):
        sizes = spread_bytes(takers, total)
        used = sum(taker.bytes_of(size) for taker, size in zip(takers, sizes, strict=True))
        assert total - 10 < used <= total
    assert spread_bytes(takers, 40) == [(1, 0), (2, 0), (1, 0)]
    assert spread_bytes(takers, 100) == [(1, 0), (8, 0), (1, 0)]
    assert spread_bytes(takers, 70) == [(1, 0), (5, 0), (1, 0)], "the last step is taken in part"
    assert spread_bytes(takers, 480) == [(19, 0), (18, 0), (11, 0)], "what nobody needs goes to all"
    with pytest.raises(ValueError, match="expected 30 bytes"):
        spread_bytes(takers, 29)


def test_layers_start_the_same_whether_their_split_was_found_or_given(
    teacher: LlamaForCausalLM, tokens: Tokens
) -> None:
    """So a run that is resumed before its first checkpoint, which knows its split, is the undisturbed one."""
    settings: dict[str, Any] = UNIFORM | {"kept": {"pairs": 5, "score": "learned"}}
    torch.manual_seed(3)
    found = convert(copy.deepcopy(teacher), LinearizationConfig(**settings, budget="heads"), input_ids=tokens(2, 60, 5))
    after = torch.rand(3)
    split = found.config.linearization["split"]
    torch.manual_seed(3)
    given = convert(copy.deepcopy(teacher), LinearizationConfig(**settings, budget="heads", split=split))
    assert torch.equal(torch.rand(3), after)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, given.state_dict()[name]), name
