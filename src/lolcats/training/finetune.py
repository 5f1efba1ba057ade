"""Stage 2, low-rank adjustment: the linearized model learns to predict text, or to predict as its teacher does.

The teacher is the same weights with softmax attention on and adapters off, so no second model is in memory (only full
fine-tuning with KL needs one, because there the weights themselves change).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats.config import FinetuneConfig
from lolcats.identity import weights_digest
from lolcats.modeling import LinearizedAttention, attention_mode, linearized_layers
from lolcats.modeling.attention import FULL, added_parameters
from lolcats.modeling.head import OutputHead
from lolcats.modeling.old_names import in_old_order, old_name
from lolcats.models.layers import decoder_layers
from lolcats.models.sharded import is_sharded, whole_tensor
from lolcats.training.batches import Batch
from lolcats.training.counted import Counted, real_tokens
from lolcats.training.identity import layer_settings
from lolcats.training.layer_errors import attention_outputs, layer_errors, listening, weighted_error
from lolcats.training.lora import add_lora, check_lora, dropping, trusting_autocast
from lolcats.training.losses import Teacher, TeacherStates, next_token_loss
from lolcats.training.passing import backward_in_parts
from lolcats.training.recall import count_right
from lolcats.training.recompute import recomputing
from lolcats.training.stage import refuse_spread
from lolcats.training.teacher_logits import (
    LogitsCache,
    TopK,
    check_logits,
    from_cache,
    keys_of,
    teacher_identity,
    top_k,
)


class FinetuneStage:
    """LoRA (or full) fine-tuning for `train`.

    Args:
        model: a converted model. LoRA layers are put into it in place; `finish` takes them out again.
        config: the stage's settings.

    Raises:
        LolcatsError: see `check_lora`.
    """

    name = section = "finetune"
    mode = FULL
    """Of the linearized layers while they learn."""

    def __init__(self, model: PreTrainedModel, config: FinetuneConfig) -> None:
        refuse_spread(model)
        self.model, self.config = model, config
        self._counted = Counted(model, config.mask_prompt, config.near_weight)
        self.adapter: PeftModel | None = None
        self.teacher: PreTrainedModel | None = None
        self.logits: LogitsCache | None = None
        """Where the teacher's are kept, if they are."""
        check_lora(model, config)
        check_logits(config, model)
        added, own = added_parameters(model), set(map(id, self.added()))
        used = [(name, p) for name, p in model.named_parameters() if name not in added or id(p) in own]
        weights = ((old_name(name), p) for name, p in used)  # so that runs of 0.1 go on
        self._sharded = is_sharded(model)
        gather = partial(whole_tensor, device=model.device)
        if config.teacher_logits.cache == "topk":
            self.logits = LogitsCache(teacher_identity(model, config.teacher_logits.k, gather))
        self._origin = {"linearization": layer_settings(model), "weights": weights_digest(weights, gather)}
        model.requires_grad_(False)
        if config.method == "lora":
            self.adapter = add_lora(model, config)
            self._move_adapters()
        else:
            if config.follows_teacher:
                self.teacher = copy.deepcopy(model)
            if not self._sharded:  # else they were made so when they were spread
                model.float()
            model.requires_grad_(True)
        self.head = OutputHead(model)
        self._teacher_head = self.head if self.teacher is None else OutputHead(self.teacher)
        for p in added.values():
            p.requires_grad_(config.train_feature_maps and id(p) in own)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parameters = {name: trained[name] for name in in_old_order(trained)}

    def added(self) -> list[nn.Parameter]:
        """What the linearization added and this stage may train."""
        return list(added_parameters(self.model).values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """LoRA matrices (or all weights), and the feature maps where asked for."""
        return self._parameters

    def origin(self) -> dict[str, Any]:
        """The settings of the layers, and all weights as stage 1 left them."""
        return self._origin

    @contextmanager
    def windowed(self, window: int | None) -> Iterator[None]:
        """Inside, all layers have this window; None: their own."""
        with ExitStack() as stack:
            for layer in linearized_layers(self.model):
                stack.enter_context(layer.mixer.windowed(window))
            yield

    def count(self, batch: Batch) -> float:
        """Tokens whose loss counts in a batch, or the sum of their weights."""
        counted, weights = self._counted.labels(batch) != -100, self._counted.weights(batch)
        return int(counted.sum()) if weights is None else float(weights[counted].sum())

    def backward(self, batch: Batch, share: float | Tensor) -> dict[str, Tensor]:
        """Gradient of the loss of a batch."""
        with self._learning():
            if batch.chunk is not None:
                return backward_in_parts(
                    batch,
                    self._counted.labels(batch),
                    self._counted.weights(batch),
                    share,
                    self.model,
                    self._part_loss,
                    self._sharded,
                )
            loss, parts = self._loss(batch)
            (loss * share).backward()
        return {"loss": loss.detach(), **parts}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and its parts; of a batch with answers how many are right."""
        if batch.answers is not None:
            return count_right(self.head, batch)
        loss, parts = self._loss(batch)
        return {"loss": loss, **parts}

    def where(self, metrics: Mapping[str, Tensor]) -> str:
        """The first layer with a gradient that is not finite."""
        for name, p in self._parameters.items():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                return f", first in {name}"
        return ""

    def finish(self) -> PeftModel | None:
        """Merge the adapters into the weights if the settings say so; otherwise return the model with adapters.

        Those on sharded weights stay.
        """
        if self.adapter is None or not self.config.merge or self._sharded:
            return self.adapter
        self.adapter.merge_and_unload()
        self.adapter = None
        return None

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, labels, weights = _inputs(batch), self._counted.labels(batch), self._counted.weights(batch)
        kept = None if self.logits is None else self._kept(batch)
        hidden, teacher, errors = self._hidden(inputs, kept, inputs, labels, weights)
        c = self.config
        plain = batch.document is None and not c.mask_prompt  # then all count but the last of each row, and near ones
        if plain:
            part = slice(self._counted.near_tokens if c.near_weight == 0 else 0, -1)
            hidden, labels = hidden[:, part], labels[:, part]
            weights = None if weights is None else weights[:, part]
            teacher = None if teacher is None else teacher.take((slice(None), part))
        return self._sum(hidden, labels, teacher, weights, errors, plain)

    def _part_loss(
        self, inputs: dict[str, Any], teacher_inputs: dict[str, Any], labels: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a part of a long text, see `backward_in_parts`."""
        hidden, teacher, errors = self._hidden(inputs, None, teacher_inputs, labels, weights)
        return self._sum(hidden, labels, teacher, weights, errors)

    def _sum(
        self,
        hidden: Tensor,
        labels: Tensor,
        teacher: Teacher | None,
        weights: Tensor | None,
        errors: Tensor | None,
        all_counted: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all losses, and each by name."""
        c = self.config
        factors = c.cross_entropy_factor, c.kl_factor
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(factors)):  # without, the first is only told
            loss, parts = next_token_loss(
                self.head, hidden, labels, teacher, *factors, all_counted=all_counted, weights=weights
            )
        if errors is None:
            return loss, parts
        # FSDP gathers a layer's weights when the gradient of its output arrives, which the last layer's must have.
        loss = loss + c.error_factor * errors.mean() + 0.0 * hidden.flatten()[:1].sum()
        return loss, {**parts, "error": errors.detach().mean(), "layers": errors.detach()}

    def layer_errors(self, batch: Batch) -> Tensor:
        """The error of the attention output of each linearized layer [L], over all real tokens; no gradients."""
        inputs, real, errors = _inputs(batch), real_tokens(batch).float(), {}
        with torch.no_grad(), attention_outputs(self.teacher or self.model, "cpu") as expected:
            self._states(inputs)

        def compare(layer: LinearizedAttention, out: Tensor) -> None:
            errors[layer.layer_idx] = weighted_error(out, expected.pop(layer.layer_idx).to(out.device), real)

        with torch.no_grad(), attention_mode(self.model, self.mode), listening(self.model, compare):
            self.head.hidden(**inputs)
        return torch.stack([errors[index] for index in sorted(errors)])

    def teacher_top(self, batch: Batch, rows: list[int] | None = None) -> TopK:
        """What the teacher predicts of some rows of a batch, as far as it is kept."""
        assert self.logits is not None
        ids, positions = batch.input_ids, batch.position_ids
        if rows is not None:
            ids, positions = ids[rows], None if positions is None else positions[rows]
        return top_k(self._states({"input_ids": ids, "position_ids": positions, "use_cache": False}), self.logits.k)

    def _kept(self, batch: Batch) -> TopK:
        """The same from disk, but for rows that are not there: questions that are made up on the way."""
        assert self.logits is not None
        ids, document = batch.input_ids.cpu().numpy(), batch.document
        keys = keys_of(ids, None if document is None else document.cpu().numpy())
        return from_cache(self.logits, keys, batch.input_ids.device, lambda rows: self.teacher_top(batch, rows))

    def _states(self, inputs: dict[str, Any]) -> TeacherStates:
        with torch.no_grad(), self._as_teacher():
            return TeacherStates(self._teacher_head.hidden(**inputs), self._teacher_logits)

    def _hidden(
        self,
        inputs: dict[str, Any],
        teacher: Teacher | None,
        teacher_inputs: dict[str, Any],
        labels: Tensor,
        weights: Tensor | None,
    ) -> tuple[Tensor, Teacher | None, Tensor | None]:
        """The student's last hidden states; what they are compared with, if it is not known; and errors of layers."""
        c = self.config
        if not c.error_factor:
            if c.kl_factor > 0 and teacher is None:
                teacher = self._states(teacher_inputs)
            with attention_mode(self.model, self.mode):
                return self.head.hidden(**inputs), teacher, None
        with attention_outputs(self.teacher or self.model) as expected:
            states = self._states(teacher_inputs)
        with attention_mode(self.model, self.mode), attention_outputs(self.model) as got:
            hidden = self.head.hidden(**inputs)
        counted = (labels != -100).float() * (1.0 if weights is None else weights)
        return hidden, states if c.kl_factor > 0 else None, layer_errors(got, expected, counted)

    def _teacher_logits(self, hidden: Tensor) -> Tensor:
        with self._as_teacher():  # a head of several layers may carry adapters
            return self._teacher_head(hidden)

    def _move_adapters(self) -> None:
        """Bring the adapters to where the model computes: peft puts them where the weights wait that they belong to."""
        for p in self.model.parameters():
            if p.requires_grad:
                p.data = p.data.to(self.model.device)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """What holds in a pass forward and backward, since layers may be computed again on the way back."""
        with ExitStack() as stack:
            stack.enter_context(trusting_autocast(self.adapter, self.model.device))
            stack.enter_context(attention_mode(self.model, self.mode))
            stack.enter_context(dropping(self.adapter))
            if self.config.gradient_checkpointing:
                stack.enter_context(recomputing(list(decoder_layers(self.model)[1])))
            yield

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        with attention_mode(self.teacher or self.model, "softmax"):
            if self.adapter is None:
                yield
            else:
                with self.adapter.disable_adapter():
                    yield


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
