"""Decoder and head of a family, learned from its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lolcats import LolcatsError
from lolcats.config import FinetuneConfig
from lolcats.evaluation.perplexity import Variant, measure
from lolcats.modeling.head import OutputHead
from lolcats.training import FinetuneStage
from lolcats.training.batches import Batch

Builder = Callable[..., Any]
Tokens = Callable[..., Tensor]

MATRIX: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.4},
    "granite": {"logits_scaling": 3.0},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 24},
    "opt": {"num_key_value_heads": None, "head_dim": None, "ffn_dim": 48, "word_embed_proj_dim": 16},
}
OWN: dict[str, dict[str, Any]] = {
    "hyperclovax": {"logits_scaling": 0.25},
    "modernbert-decoder": {"head_dim": None, "num_key_value_heads": None},
    "roberta": {"head_dim": None, "num_key_value_heads": None, "is_decoder": True},
}


@pytest.mark.parametrize("family", [*MATRIX, *OWN])
def test_logits_are_the_models_own(build: Builder, tokens: Tokens, family: str) -> None:
    model = build(family, **(MATRIX | OWN)[family])
    head = OutputHead(model)
    assert head.is_matrix == (family in MATRIX)
    with torch.no_grad():
        hidden = head.hidden(input_ids=tokens(), position_ids=None, use_cache=False)
        torch.testing.assert_close(head(hidden), model(tokens()).logits)
        torch.testing.assert_close(head(hidden[0, 3]), model(tokens()).logits[0, 3])


@pytest.mark.parametrize("family", OWN)
def test_the_familys_own_forward_has_gradients(build: Builder, tokens: Tokens, family: str) -> None:
    """In the hidden states, and in the head's parameters, as autograd through the whole model gives them."""
    model = build(family, **OWN[family])
    head = OutputHead(model)
    model(tokens(1)).logits.square().sum().backward()
    expected = {p: p.grad for p in head.parameters() if p.grad is not None}
    model.zero_grad()
    hidden = head.hidden(input_ids=tokens(1), use_cache=False)
    head(hidden).square().sum().backward()
    assert expected
    for parameter, gradient in expected.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_perplexity_is_that_of_the_models_logits(build: Builder, tokens: Tokens) -> None:
    model = build("hyperclovax", **OWN["hyperclovax"])
    ids = tokens(2, 12)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert measure({"x": Variant(model)}, ids)["x"].loss == pytest.approx(float(loss), rel=1e-5)


def test_a_head_that_asks_for_more_than_hidden_states_is_refused(
    teacher: LlamaForCausalLM, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        output: Any = plain(self, input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids[..., None]  # no hidden state tells the token
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(LolcatsError, match=r"LlamaForCausalLM cannot be split into a decoder and a head.* differ by"):
        OutputHead(teacher)


def test_nothing_stays_behind(teacher: LlamaForCausalLM) -> None:
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    head = OutputHead(teacher)
    assert teacher.training and "forward" not in head.decoder.__dict__ and not head.decoder._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_fine_tuning_compares_with_the_teachers_own_head(
    make_student: Builder, tokens: Tokens, dtype: torch.dtype
) -> None:
    """The student's head is trained and float32; the teacher's logits stay what they were."""
    student = make_student(window=30).to(dtype)
    ids = tokens(1)
    with torch.no_grad():
        log_t = student(ids).logits[:, :-1].float().log_softmax(-1)  # the window makes it its teacher
    stage = FinetuneStage(student, FinetuneConfig(method="full", kl_factor=1.0, cross_entropy_factor=0.0))
    with torch.no_grad():
        student.lm_head.weight.add_(0.1)
        student.lm_head.weight[5:9] *= 2
        log_p = student(ids).logits[:, :-1].log_softmax(-1)
        kl = stage.validate(Batch(ids, torch.ones_like(ids).bool(), None, None))["kl"]
    expected = (log_t.exp() * (log_t - log_p)).sum(-1).mean()
    torch.testing.assert_close(kl, expected, rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-5)
