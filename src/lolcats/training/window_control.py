"""The control of stage 2: a plain window of the memory of the student, which gets the student's own training."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from lolcats.modeling import linearized_layers
from lolcats.modeling.attention import EQUAL_WINDOW
from lolcats.training.finetune import FinetuneStage
from lolcats.variants import TRAINED_WINDOW


class WindowStage(FinetuneStage):
    """`FinetuneStage` of a model whose linearized layers are plain windows of the bytes of their state.

    Nothing of the mixers runs but the ranges of pairs in few bits, so what stage 1 made of them does not matter.

    Args:
        model: a converted model with the teacher's weights.
        config: the settings of stage 2.
    """

    name = TRAINED_WINDOW
    mode = EQUAL_WINDOW

    def added(self) -> list[nn.Parameter]:
        """The ranges of pairs that are kept in few bits."""
        return list(window_parameters(self.model).values())


def window_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """What the plain windows of a converted model share with its mixers, by the names in the model."""
    used = {id(p) for layer in linearized_layers(model) for p in layer.window(torch.float32).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in used}
