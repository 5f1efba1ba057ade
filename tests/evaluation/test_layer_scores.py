"""Which layers should keep softmax: scores of single layers, from passes that start in the middle of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lolcats import LolcatsError
from lolcats.config.mixers import BlendConfig
from lolcats.evaluation import Variant, measure
from lolcats.evaluation.layer_scores import LayerScore, halo, passkeys, score_layers, split_layers
from lolcats.modeling import attention_mode, convert, linearized_layers
from lolcats.modeling.replay import LayerModes

WINDOW = BlendConfig(window=3, sinks=0, far="none", start="plain")


@pytest.fixture
def student(make_teacher: Callable[..., LlamaForCausalLM]) -> PreTrainedModel:
    """Four layers, of which layer 2 alone looks far back: the attention of the others gives nothing."""
    teacher = make_teacher(num_hidden_layers=4)
    with torch.no_grad():
        for index in (0, 1, 3):
            teacher.get_parameter(f"model.layers.{index}.self_attn.o_proj.weight").mul_(0.01)
    return convert(teacher, WINDOW)


def by_hand(model: PreTrainedModel, ids: Tensor, replaced: set[int]) -> tuple[float, float]:
    """Loss and KL to the teacher with some layers replaced, in whole passes."""

    def logits(layers: set[int]) -> Tensor:
        with attention_mode(model, "softmax"), torch.no_grad():
            for layer in linearized_layers(model):
                layer.mode = "equal_window" if layer.layer_idx in layers else "softmax"
            return model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)

    p, q = logits(set()), logits(replaced)
    loss = -q.gather(-1, ids[:, 1:, None]).mean()
    return float(loss), float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("score", ["kl", "kl_rest"])
def test_the_layer_that_matters_comes_first(
    student: PreTrainedModel, tokens: Callable[..., Tensor], score: Any
) -> None:
    ids = tokens(3, 24)
    found = score_layers(student, ids, score)
    assert found[0].layer == 2 and len(found) == 4
    for item in found:
        replaced = {item.layer} if score == "kl" else {0, 1, 2, 3} - {item.layer}
        loss, kl = by_hand(student, ids, replaced)
        assert item.loss == pytest.approx(loss, rel=1e-4) and item.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert item.score == (item.kl if score == "kl" else -item.kl)
    assert split_layers(found, 0.25) == ([2], [0, 1, 3])


def test_halo_asks_for_what_is_far_back(student: PreTrainedModel, tokens: Callable[..., Tensor]) -> None:
    text, questions = tokens(2, 24), list(tokens(2, 20, 9))
    found = score_layers(student, text, "halo", questions=questions, answer_tokens=4)
    modes = LayerModes(student)
    for item in found:
        chosen = dict.fromkeys(modes.layers, "softmax") | {item.layer: "equal_window"}
        variant = Variant(student, lambda chosen=chosen: modes.record("x", chosen))
        losses = [measure({"x": variant}, question[None], last=4)["x"].loss for question in questions]
        assert item.recall == pytest.approx(-sum(losses) / 2, rel=1e-4)
    ordered = sorted(found, key=lambda item: item.layer)
    recalls, losses = [item.recall or 0.0 for item in ordered], [-item.loss for item in ordered]
    assert [item.score for item in ordered] == halo(recalls, losses)


def test_halo_is_the_formula() -> None:
    assert halo([0.9, 0.5, 0.8], [0.7, 0.5, 0.6]) == pytest.approx([0.0, 2.0, 1.0])
    assert halo([0.9, 0.5], [0.6, 0.7]) == [0.0, 50.0], "the bound, where nothing else is lost"


def test_blocks_that_did_not_change_are_not_run_again(student: PreTrainedModel, tokens: Callable[..., Tensor]) -> None:
    modes = LayerModes(student)
    assert modes.replays
    calls = [0] * 4
    for index, block in enumerate(modes.blocks):
        block.get_submodule("self_attn").register_forward_pre_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    softmax, ids = dict.fromkeys(range(4), "softmax"), tokens(1, 24)
    with torch.no_grad(), modes.record("teacher", softmax):
        student(input_ids=ids, use_cache=False)
    with torch.no_grad(), modes.replay("teacher", softmax | {2: "equal_window"}, 2):
        student(input_ids=ids, use_cache=False)
    assert calls == [1, 1, 2, 2]
    assert {layer.mode for layer in linearized_layers(student)} == {"full"}
    student(input_ids=ids, use_cache=False)
    assert calls == [2, 2, 3, 3]


def test_blocks_with_a_side_channel_are_always_run(student: PreTrainedModel, tokens: Callable[..., Tensor]) -> None:
    """A family whose blocks read what an earlier one left elsewhere than in the hidden states."""
    held: list[Tensor] = []
    first, *_, last = (block.get_submodule("input_layernorm") for block in LayerModes(student).blocks)
    first.register_forward_hook(lambda _module, _args, out: held.append(cast(Tensor, out)))
    last.register_forward_hook(lambda _module, _args, out: torch.add(cast(Tensor, out), held.pop()))
    modes = LayerModes(student)
    assert not modes.replays
    ids = tokens(1, 24)
    found = score_layers(student, ids, "kl")
    held.clear()
    assert found[0].kl == pytest.approx(by_hand(student, ids, {found[0].layer})[1], rel=1e-3)


def test_passkeys_end_in_their_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts, count = passkeys(tiny_tokenizer, 300, 3)
    assert len(texts) == 3 and count >= 1
    for text in texts:
        key = str(tiny_tokenizer.decode(text[-count:])).strip()
        assert len(text) <= 300 and str(tiny_tokenizer.decode(text)).count(key) >= 2, (
            "hidden in the text, and asked for"
        )
    again, _ = passkeys(tiny_tokenizer, 300, 3)
    assert all(torch.equal(a, b) for a, b in zip(texts, again, strict=True))


def test_what_cannot_be_scored(student: PreTrainedModel, tokens: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="expected one of kl, kl_rest, halo, halo with questions; got 'halo'"):
        score_layers(student, tokens(), "halo")
    scores = [LayerScore(layer, -layer, 0.0, 0.0) for layer in range(3)]
    assert split_layers(scores, 0.0) == ([0], [1, 2]) and split_layers(scores, 1.0) == ([0, 1], [2])


def test_one_layer_is_no_choice(make_teacher: Callable[..., LlamaForCausalLM], tokens: Callable[..., Tensor]) -> None:
    model = convert(make_teacher(num_hidden_layers=1), WINDOW)
    with pytest.raises(LolcatsError, match="has 1 layers to choose from; expected two or more"):
        score_layers(model, tokens())
