"""Which tokens count in the losses of stage 2, and how much."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.modeling import linearized_layers
from lolcats.training.batches import Batch
from lolcats.training.losses import shifted_labels


class Counted:
    """The tokens of a batch that count.

    Args:
        model: converted; the windows and sinks of its layers say which tokens are near.
        mask_prompt: only responses count.
        near_weight: of near tokens, those that see their whole text in window and sinks.
    """

    def __init__(self, model: PreTrainedModel, mask_prompt: bool, near_weight: float) -> None:
        self.model, self.mask_prompt, self.near_weight = model, mask_prompt, near_weight

    def labels(self, batch: Batch) -> Tensor:
        """The next token at each position [B, N] that counts, else -100."""
        counted = batch.loss_mask if self.mask_prompt else real_tokens(batch)
        labels = shifted_labels(batch.input_ids, counted, batch.document)
        return labels.masked_fill(self._near(batch), -100) if self.near_weight == 0 else labels

    def weights(self, batch: Batch) -> Tensor | None:
        """Of each token [B, N] in the loss, None where all that count weigh the same."""
        if self.near_weight in (0, 1):
            return None
        return torch.where(self._near(batch), self.near_weight, 1.0)

    @property
    def near_tokens(self) -> int:
        """Tokens of a text that are near in all layers, with the windows that they have now."""
        return min(layer.mixer.near_tokens for layer in linearized_layers(self.model))

    def _near(self, batch: Batch) -> Tensor:
        """Which tokens [B, N] are near."""
        position = batch.position_ids
        if position is None:
            ids = batch.input_ids
            position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return position < self.near_tokens


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens [B, N] are no padding."""
    if batch.document is None:
        return torch.ones_like(batch.loss_mask)
    return batch.document >= 0
