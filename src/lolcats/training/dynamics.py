"""What LoRA does to each module while stage 2 runs: the size of its update, and in how many directions it goes.

At the begin of the stage and at each validation a line goes to lora.jsonl: Frobenius norm and effective rank of
scale B A for each module with adapters, and the error of each linearized layer on a few validation sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from torch import nn

from lolcats.modeling import LinearizedAttention
from lolcats.models.sharded import whole_tensor
from lolcats.training.batches import make_batch
from lolcats.training.finetune import FinetuneStage
from lolcats.training.parallel import from_main_process
from lolcats.training.report import Reporter
from lolcats.training.stage import Stage, TrainingData
from lolcats.training.update_size import update_size

SEQUENCES = 4
"""Of the validation data, by which the errors of layers are found: read one by one, as one is the least memory."""


class Dynamics:
    """The lines of lora.jsonl; none where a stage is not the student's, has no adapters, is not asked or not read.

    Args:
        stage: of training.
        data: with the validation sequences.
        reporter: where lines go, in the main process.
        accelerator: all processes compute, as a sharded model needs.
        autocast: as in training.
    """

    def __init__(
        self,
        stage: Stage,
        data: TrainingData,
        reporter: Reporter,
        accelerator: Accelerator,
        autocast: torch.dtype | None,
    ) -> None:
        self.reporter, self.data, self.device, self.autocast = reporter, data, accelerator.device, autocast
        self.stage: FinetuneStage | None = None
        if isinstance(stage, FinetuneStage) and stage.adapter is not None and stage.config.lora_dynamics:
            of_student = stage.name == stage.section  # its control is trained by a stage of another name
            if of_student and from_main_process(accelerator, lambda: reporter.path is not None):
                self.stage = stage

    def begin(self, step: int) -> None:
        """Write the line of a stage that has not done a step; of one that goes on it is there."""
        if step == 0:
            self.note(0)

    def note(self, step: int) -> None:
        """Write the line of a step."""
        if self.stage is None:
            return
        cuda = [self.device] if self.device.type == "cuda" else []
        precision = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.no_grad(), torch.random.fork_rng(cuda), precision:  # the training's random numbers go on as ever
            errors = self._errors(self.stage)
        self.reporter.lora(self.stage.name, step, update_sizes(self.stage.model), errors)

    def _errors(self, stage: FinetuneStage) -> list[float]:
        rows = range(min(SEQUENCES, len(self.data.validation)))
        batches = (make_batch(self.data.validation, np.array([n]), self.device, self.data.keep_apart) for n in rows)
        return torch.stack([stage.layer_errors(batch) for batch in batches]).double().mean(0).tolist()


def update_sizes(model: nn.Module) -> dict[str, tuple[float, float]]:
    """See `update_size`, of each module with LoRA, by its name.

    Args:
        model: with adapters of peft, not merged; if they are sharded, in all processes.
    """
    sizes: dict[str, tuple[float, float]] = {}
    for name, module in _module_names(model).items():
        for adapter, a in module.lora_A.items():
            down, up = (layer.get_parameter("weight") for layer in (a, module.lora_B[adapter]))
            sizes[name] = update_size(whole_tensor(down), whole_tensor(up), module.scaling[adapter])
    return sizes


def _module_names(model: nn.Module) -> dict[str, LoraLayer]:
    """Modules with adapters by the names that the family gives them: without the wrapper, and without its prefix."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    wrappers = [name for name, module in model.named_modules() if isinstance(module, LinearizedAttention)]
    found: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            wrapper = next((w for w in wrappers if name.startswith(f"{w}.inner.")), None)
            own = name if wrapper is None else wrapper + name.removeprefix(f"{wrapper}.inner")
            found[own.removeprefix(prefix)] = module
    return found
