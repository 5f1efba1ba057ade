"""The control of stage 2: a plain window of the memory of the student, which gets the student's own training."""

from __future__ import annotations

from torch import nn

from lolcats.modeling.attention import EQUAL_WINDOW
from lolcats.training.finetune import FinetuneStage
from lolcats.variants import TRAINED_WINDOW


class WindowStage(FinetuneStage):
    """`FinetuneStage` of a model whose linearized layers are plain windows of the bytes of their state.

    Nothing of the mixers runs, so what stage 1 made of them does not matter.

    Args:
        model: a converted model with the teacher's weights.
        config: the settings of stage 2.
    """

    name = TRAINED_WINDOW
    mode = EQUAL_WINDOW

    def added(self) -> list[nn.Parameter]:
        """Nothing: a plain window has no parameters."""
        return []
