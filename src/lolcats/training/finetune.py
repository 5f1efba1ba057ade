"""Stage 2, low-rank adjustment: the linearized model learns to predict text, or to predict as its teacher does.

The teacher is the same weights with softmax attention on and adapters off, so no second model is in memory (only full
fine-tuning with KL needs one, because there the weights themselves change).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lolcats.config import FinetuneConfig
from lolcats.errors import LolcatsError
from lolcats.identity import weights_digest
from lolcats.modeling import LinearizedAttention, attention_mode
from lolcats.modeling.attention import FULL, added_parameters
from lolcats.modeling.head import OutputHead
from lolcats.modeling.hf import is_added
from lolcats.modeling.old_names import in_old_order, old_name
from lolcats.training.batches import Batch
from lolcats.training.identity import layer_settings
from lolcats.training.losses import TeacherStates, next_token_loss, shifted_labels

ROUTERS = {"router", "gate", "shared_expert_gate"}
"""Names of modules that choose experts: what they choose must not change by the way."""

MANY = 1 << 23
"""Numbers of adapters that may be of no use, as in tiny models; more are a mistake."""


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
        self.model, self.config = model, config
        self.adapter: PeftModel | None = None
        self.teacher: PreTrainedModel | None = None
        check_lora(model, config)
        added, own = added_parameters(model), set(map(id, self.added()))
        used = [(name, p) for name, p in model.named_parameters() if name not in added or id(p) in own]
        weights = ((old_name(name), p) for name, p in used)  # so that runs of 0.1 go on
        self._origin = {"linearization": layer_settings(model), "weights": weights_digest(weights)}
        model.requires_grad_(False)
        if config.method == "lora":
            self.adapter = add_lora(model, config)
        else:
            if config.kl_factor > 0:
                self.teacher = copy.deepcopy(model)
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

    def count(self, batch: Batch) -> int:
        """Tokens whose loss counts in a batch."""
        return int((self._labels(batch) != -100).sum())

    def backward(self, batch: Batch, share: float | Tensor) -> dict[str, Tensor]:
        """Gradient of the loss of a batch."""
        with self._autocast_casts():
            loss, parts = self._loss(batch)
        (loss * share).backward()
        return {"loss": loss.detach(), **parts}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and its parts."""
        loss, parts = self._loss(batch)
        return {"loss": loss, **parts}

    def where(self, metrics: Mapping[str, Tensor]) -> str:
        """The first layer with a gradient that is not finite."""
        for name, p in self._parameters.items():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                return f", first in {name}"
        return ""

    def finish(self) -> PeftModel | None:
        """Merge the adapters into the weights if the settings say so; otherwise return the model with adapters."""
        if self.adapter is None or not self.config.merge:
            return self.adapter
        self.adapter.merge_and_unload()
        self.adapter = None
        return None

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        teacher = None
        if self.config.kl_factor > 0:
            with torch.no_grad(), self._as_teacher():
                teacher = TeacherStates(self._teacher_head.hidden(**inputs), self._teacher_logits)
        with attention_mode(self.model, self.mode):
            hidden = self.head.hidden(**inputs)
        c, labels = self.config, self._labels(batch)
        plain = batch.document is None and not c.mask_prompt  # then all count but the last of each row
        if plain:
            hidden, labels = hidden[:, :-1], labels[:, :-1]
            teacher = None if teacher is None else teacher._replace(hidden=teacher.hidden[:, :-1])
        return next_token_loss(self.head, hidden, labels, teacher, c.cross_entropy_factor, c.kl_factor, plain)

    def _teacher_logits(self, hidden: Tensor) -> Tensor:
        with self._as_teacher():  # a head of several layers may carry adapters
            return self._teacher_head(hidden)

    def _labels(self, batch: Batch) -> Tensor:
        counted = batch.loss_mask if self.config.mask_prompt else _real(batch)
        return shifted_labels(batch.input_ids, counted, batch.document)

    @contextmanager
    def _autocast_casts(self) -> Iterator[None]:
        """Under autocast peft need not cast inputs to float32, which autocast would cast back for the product."""
        device = self.model.device.type
        if self.adapter is None or not torch.is_autocast_enabled(device):
            yield
        else:
            with disable_input_dtype_casting(self.adapter):
                yield

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        with attention_mode(self.teacher or self.model, "softmax"):
            if self.adapter is None:
                yield
            else:
                with self.adapter.disable_adapter():
                    yield


def _real(batch: Batch) -> Tensor:
    if batch.document is None:
        return torch.ones_like(batch.loss_mask)
    return batch.document >= 0


def check_lora(model: PreTrainedModel, config: FinetuneConfig) -> None:
    """See that LoRA layers can be put on the targets, before anything is trained.

    Raises:
        LolcatsError: a name in `config.targets` is no linear layer of the model, there are no targets, or a rank
            larger than any of them could use would take much memory.
    """
    if config.method != "lora":
        return
    targets = lora_targets(model, config.targets)
    if not targets:
        raise LolcatsError(
            f"finetune.targets {config.targets!r}: this model has no linear layers there; name some of "
            f"{sorted({_last(n) for n in lora_targets(model, 'all')})}, or use finetune.method=full"
        )
    sides = [_sides(model.get_submodule(name)) for name in targets]
    largest, numbers = max(map(min, sides)), config.rank * sum(map(sum, sides))
    if config.rank > largest and numbers > MANY:
        raise LolcatsError(
            f"finetune.rank {config.rank} is more than the smaller side of every target, at most {largest}: "
            f"{numbers:,} numbers of adapters for nothing; lower it"
        )


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Both sides of the weight of a linear layer."""
    if isinstance(layer, nn.Linear):  # its weight may be packed
        return layer.in_features, layer.out_features
    rows, columns = layer.get_parameter("weight").shape
    return rows, columns


def add_lora(model: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """Put LoRA layers on the targets (see `lora_targets`).

    Raises:
        LolcatsError: a name in `config.targets` is no linear layer of the model.
    """
    lora = lora_config(model, config, lora_targets(model, config.targets))
    adapter = get_peft_model(model, lora)
    assert isinstance(adapter, PeftModel)
    return adapter


def lora_config(model: nn.Module, config: FinetuneConfig, targets: list[str]) -> LoraConfig:
    """What peft needs to put LoRA layers on `targets`, full names of linear layers of `model`."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides by the rank: a float is fine
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        task_type="CAUSAL_LM",
    )


def lora_targets(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Full names of the linear layers that `targets` stands for.

    Args:
        targets: "attention" is every linear layer of the family inside linearized attention, "all" every linear layer
            but the output embedding, routers of experts and what the linearization added. In a list, a name that
            occurs inside linearized attention (q_proj) is meant there, one that does not (gate_proj) everywhere.
    """
    head = model.get_output_embeddings()
    linear = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not head and not is_added(n) and not ROUTERS & set(n.split("."))
    }
    layers = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, LinearizedAttention))
    inside = [n for n in linear if n.startswith(layers)]
    if targets == "attention":
        return inside
    if targets == "all":
        return list(linear)
    own = {_last(n) for n in inside}
    missing = [t for t in targets if t not in {_last(n) for n in linear}]
    if missing:
        known = sorted({_last(n) for n in linear})
        raise LolcatsError(f"finetune.targets {missing} are no linear layers of this model; it has {known}")
    return [n for n in linear if _last(n) in targets and (_last(n) not in own or n in inside)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
