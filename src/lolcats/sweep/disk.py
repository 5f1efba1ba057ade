"""Bytes that a run will leave on disk, from the shapes of its model alone: no weights are read."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats.config import RunConfig
from lolcats.modeling.attention import added_parameters
from lolcats.modeling.convert import check_supported
from lolcats.modeling.install import install
from lolcats.models.config import read_model_config
from lolcats.models.device import choose_device, choose_dtype
from lolcats.models.folder import expand_model
from lolcats.models.teacher import demo_file
from lolcats.training.finetune import lora_targets

ADAMW = 3
"""A checkpoint to go on from holds parameters and two moments; the best one parameters alone. All are float32."""


@dataclass
class DiskEstimate:
    """Sizes of runs; a model's shapes are made once."""

    _models: dict[str, PreTrainedModel | None] = field(default_factory=dict)

    def bytes(self, config: RunConfig) -> int | None:
        """Model and checkpoints of a finished run; None where the model's configuration is not at hand.

        Raises:
            LolcatsError: the model cannot be linearized with these settings.
        """
        if config.model not in self._models:
            self._models[config.model] = empty_model(config.model)
        teacher = self._models[config.model]
        return None if teacher is None else _run_bytes(teacher, config)


def empty_model(source: str) -> PreTrainedModel | None:
    """A model on the meta device; None where its configuration cannot be read."""
    try:
        source = expand_model(source)
        if source == "demo" or source.endswith(".gguf"):
            file = demo_file() if source == "demo" else Path(source)
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        else:
            config = read_model_config(source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _run_bytes(teacher: PreTrainedModel, config: RunConfig) -> int:
    dtype = choose_dtype(config.dtype, choose_device(config.device))
    check_supported(teacher)
    with torch.device("meta"):
        model = copy.deepcopy(teacher)
        install(model, config.linearization)
    added = sum(p.numel() for p in added_parameters(model).values())
    weights = sum(p.numel() for p in model.parameters()) - added
    trained = [added] if config.transfer.enabled else []
    fine = config.finetune
    if fine.enabled and fine.method == "lora":
        trained.append(_lora_parameters(model, config) + (added if fine.train_feature_maps else 0))
    elif fine.enabled:
        trained.append(weights + (added if fine.train_feature_maps else 0))
    width = 4 if fine.enabled and fine.method == "full" else dtype.itemsize  # full fine-tuning leaves float32 weights
    return weights * width + 4 * added + 4 * (ADAMW + 1) * sum(trained)


def _lora_parameters(model: PreTrainedModel, config: RunConfig) -> int:
    shapes = [model.get_submodule(name).weight.shape for name in lora_targets(model, config.finetune.targets)]
    return sum(config.finetune.rank * sum(shape) for shape in shapes)  # type: ignore[arg-type]
