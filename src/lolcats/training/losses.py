"""Losses of both stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.mixers import Call, Mixer
from lolcats.mixers.softmax import softmax_weights
from lolcats.modeling.head import OutputHead

HEAD_CHUNK = 2048
"""Tokens whose logits are in memory at once: 2048 x 49,152 float32 logits are 0.4 GB."""


def output_error(student: Tensor, teacher: Tensor, document: Tensor | None) -> Tensor:
    """Mean squared error of attention outputs [B, H, N, Dv], padding (negative `document` [B, N]) left out."""
    return mean_over_real(token_error(student, teacher), document)


def token_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of attention outputs [B, H, N, Dv] at each token [B, N]."""
    return (student.float() - teacher.float()).square().mean((1, 3))


def mean_over_real(values: Tensor, document: Tensor | None) -> Tensor:
    """Mean of values [B, N] of tokens, padding (negative `document` [B, N]) left out."""
    if document is None:
        return values.mean()
    real = document >= 0
    return (values * real).sum() / real.sum().clamp_min(1)


def weight_cross_entropy(mixer: Mixer, call: Call, document: Tensor | None) -> Tensor:
    """Cross-entropy between the attention weights of teacher and layer (Hedgehog, arXiv 2402.04347); O(N^2) memory.

    Raises:
        LolcatsError: the layer has no attention weights.
    """
    teacher, student = softmax_weights(call), mixer.attention_weights(call)
    losses = -(teacher * student.clamp_min(1e-12).log()).sum(-1).mean(1)  # [B, N]
    return mean_over_real(losses, document)


class Teacher(Protocol):
    """What a student is compared with, at each position."""

    def take(self, index: Any) -> Teacher:
        """Some of the positions."""
        ...

    def flat(self) -> Teacher:
        """The positions [B, N] in one row."""
        ...

    def divergence(self, log_p: Tensor, weights: Tensor | None) -> Tensor:
        """Sum of KL(teacher || student) over positions, the student's log-probabilities [T, vocabulary] given."""
        ...


class TeacherStates(NamedTuple):
    """What the teacher's logits are made from, a few thousand tokens at a time."""

    hidden: Tensor
    """[B, N, d_model] or [T, d_model]."""
    head: Callable[[Tensor], Tensor]
    """The teacher's own map to logits: the student's may have been trained, or be of another dtype."""

    def take(self, index: Any) -> TeacherStates:
        """Some of the positions."""
        return self._replace(hidden=self.hidden[index])

    def flat(self) -> TeacherStates:
        """The positions of all rows in one."""
        return self._replace(hidden=self.hidden.flatten(0, 1))

    def divergence(self, log_p: Tensor, weights: Tensor | None) -> Tensor:
        """Sum over positions, times their weights, of KL(teacher || student)."""
        with torch.no_grad():
            log_t = self.head(self.hidden).log_softmax(-1)
        if weights is None:
            return nnf.kl_div(log_p, log_t, reduction="sum", log_target=True)
        return nnf.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1) @ weights


def next_token_loss(
    head: OutputHead,
    hidden: Tensor,
    labels: Tensor,
    teacher: Teacher | None,
    cross_entropy_factor: float,
    kl_factor: float,
    all_counted: bool = False,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next token and KL(teacher || student), from the last hidden states.

    The logits are made a few thousand tokens at a time and never all at once.

    Args:
        head: the student's map from hidden states to logits.
        hidden: [B, N, d_model], the student's.
        teacher: of the same positions; None without KL.
        labels: [B, N] int64, the next token of each position, -100 where it does not count.
        all_counted: the caller knows that there is no -100, so that the device need not be asked for it.
        weights: [B, N] float32, of each position where it counts; None is 1 for all.

    Returns:
        The weighted sum, differentiable in `hidden` (and in the head, where it is trained), and the mean over counted
        tokens of each part by name, in nats.
    """
    rows, targets = hidden.flatten(0, 1), labels.flatten()
    weights = None if weights is None else weights.flatten()
    teacher = None if teacher is None else teacher.flat()
    if not all_counted:
        counted = targets != -100
        rows, targets = rows[counted], targets[counted]
        weights = None if weights is None else weights[counted]
        teacher = None if teacher is None else teacher.take(counted)
    if any(p.requires_grad for p in head.parameters()):
        parts = _loss_parts(head, rows, targets, teacher, kl_factor > 0, weights)
        sums = torch.stack(parts)
    else:
        factors = cross_entropy_factor, kl_factor
        sums = cast(Tensor, _ChunkedLoss.apply(rows, head, targets, teacher, *factors, weights))
    cross_entropy, kl = sums / (max(1, targets.numel()) if weights is None else weights.sum().clamp_min(1e-9))
    loss = cross_entropy_factor * cross_entropy + kl_factor * kl
    named = {"cross_entropy": cross_entropy.detach()}
    if kl_factor > 0:
        named["kl"] = kl.detach()
    return loss, named


def _loss_parts(
    head: OutputHead,
    rows: Tensor,
    targets: Tensor,
    teacher: Teacher | None,
    with_kl: bool,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums over rows, times their weights, of cross-entropy and KL."""
    log_p = head(rows).log_softmax(-1)
    if weights is None:
        cross_entropy = nnf.nll_loss(log_p, targets, reduction="sum")
    else:
        cross_entropy = nnf.nll_loss(log_p, targets, reduction="none") @ weights
    if teacher is None or not with_kl:
        return cross_entropy, torch.zeros_like(cross_entropy)
    return cross_entropy, teacher.divergence(log_p, weights)


class _ChunkedLoss(torch.autograd.Function):
    """Both sums, with the gradient in the hidden states computed on the way forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: OutputHead,
        targets: Tensor,
        teacher: Teacher | None,
        ce_factor: float,
        kl_factor: float,
        weights: Tensor | None,
    ) -> Tensor:
        sums = torch.zeros(2, device=rows.device)
        needs_grad = rows.requires_grad
        gradient = torch.zeros_like(rows) if needs_grad else None
        for begin in range(0, rows.shape[0], HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            chunk = rows[part].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                reference = None if teacher is None else teacher.take(part)
                some = None if weights is None else weights[part]
                parts = _loss_parts(head, chunk, targets[part], reference, kl_factor > 0, some)
                total = ce_factor * parts[0] + kl_factor * parts[1]
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(total, chunk)
            sums += torch.stack([p.detach() for p in parts])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.factors = (ce_factor, kl_factor)
        return sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # The caller weighs the two sums by the same factors, so either one gives the common scale.
        (gradient,) = ctx.saved_tensors
        grad = grad_outputs[0]
        index = 0 if ctx.factors[0] > 0 else 1
        return gradient * (grad[index] / ctx.factors[index]).to(gradient.dtype), *[None] * 6


def shifted_labels(input_ids: Tensor, loss_mask: Tensor, document: Tensor | None) -> Tensor:
    """The next token of each position [B, N]; -100 at the end, where `loss_mask` is False, and across documents."""
    labels = torch.where(loss_mask, input_ids, -100)
    if document is not None:
        starts = torch.ones_like(document, dtype=torch.bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        labels = torch.where(starts, -100, labels)
    return nnf.pad(labels[:, 1:], (0, 1), value=-100)
