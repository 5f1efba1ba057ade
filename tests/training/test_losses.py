"""The loss of stage 2 in chunks, against the same numbers from all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lolcats.modeling.head import OutputHead
from lolcats.training import losses
from lolcats.training.losses import TeacherStates, next_token_loss, output_error, shifted_labels

Tokens = Callable[..., Tensor]


@pytest.mark.parametrize("factors", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_chunks_give_values_and_gradients_of_the_whole(
    teacher: LlamaForCausalLM,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    factors: tuple[float, float],
    trained_head: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr(losses, "HEAD_CHUNK", chunk)
    ce_factor, kl_factor = factors
    teacher.requires_grad_(trained_head)
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(2, 11, 36, generator=generator) for _ in range(2))
    labels = tokens(2, 11).clone()
    labels[0, :4] = labels[:, -1] = -100

    rows = hidden.clone().requires_grad_()
    head = OutputHead(teacher)
    loss, parts = next_token_loss(head, rows, labels, TeacherStates(other, head), ce_factor, kl_factor)
    (loss * 0.7).backward()
    head_gradient = teacher.lm_head.weight.grad
    teacher.lm_head.weight.grad = None

    plain = hidden.clone().requires_grad_()
    counted = labels != -100
    log_p = teacher.lm_head(plain)[counted].log_softmax(-1)
    log_t = teacher.lm_head(other)[counted].log_softmax(-1).detach()
    ce = nnf.nll_loss(log_p, labels[counted])
    kl = (log_t.exp() * (log_t - log_p)).sum(-1).mean()
    expected = ce_factor * ce + kl_factor * kl
    (expected * 0.7).backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["cross_entropy"], ce)
    if kl_factor:
        torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(rows.grad, plain.grad)
    if trained_head:
        torch.testing.assert_close(head_gradient, teacher.lm_head.weight.grad)


def test_logits_are_made_a_chunk_at_a_time(
    teacher: LlamaForCausalLM, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "HEAD_CHUNK", 5)
    teacher.requires_grad_(False)
    sizes: list[int] = []
    head = OutputHead(teacher)
    teacher.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[0]))
    hidden = torch.randn(2, 11, 36, requires_grad=True)
    next_token_loss(head, hidden, tokens(2, 11), TeacherStates(hidden.detach(), head), 1.0, 1.0)[0].backward()
    assert max(sizes) == 5


def test_without_a_counted_token_the_loss_is_zero(teacher: LlamaForCausalLM) -> None:
    teacher.requires_grad_(False)
    hidden = torch.randn(1, 4, 36, requires_grad=True)
    loss, _ = next_token_loss(OutputHead(teacher), hidden, torch.full((1, 4), -100), None, 1.0, 0.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.4}),
        ("granite", {"logits_scaling": 3.0}),
        ("llama", {}),
    ],
)
def test_head_gives_the_models_own_logits(tokens: Tokens, family: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "pad_token_id": 0,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5}  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | settings))).eval()
    with torch.no_grad():
        hidden = model.base_model(tokens()).last_hidden_state
        torch.testing.assert_close(OutputHead(model)(hidden), model(tokens()).logits)


def test_labels_are_the_next_tokens_of_the_same_document() -> None:
    ids = torch.arange(10, 20)[None]
    document = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1, -1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 0, 0, 0]]).bool()
    n = -100
    assert shifted_labels(ids, mask, document).tolist() == [[11, 12, n, 14, n, 16, n, n, n, n]]
    assert shifted_labels(ids, mask, None).tolist() == [[11, 12, 13, 14, n, 16, n, n, n, n]]


def test_output_error_leaves_padding_out() -> None:
    student, teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    segments = torch.tensor([[0, 0, 0, 0, 0], [0, 0, -1, -1, -1]])
    expected = torch.cat([(student - teacher)[0], (student - teacher)[1, :, :2]], 1).square().mean()
    torch.testing.assert_close(output_error(student, teacher, segments), expected)
    torch.testing.assert_close(output_error(student, teacher, None), (student - teacher).square().mean())
