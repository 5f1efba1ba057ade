"""Stage 1, attention transfer: each layer learns to give the output of its own softmax attention.

The model runs as its teacher. In every linearized layer both attentions see the same frozen q, k, v; the error is
back-propagated there and then, and the teacher's output goes on to the next layer. So errors do not propagate, and
memory is that of one layer, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats.config import TransferConfig
from lolcats.errors import LolcatsError
from lolcats.identity import weights_digest
from lolcats.modeling import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.modeling.attention import added_parameters
from lolcats.modeling.hf import is_added
from lolcats.models.sharded import whole_tensor
from lolcats.training.batches import Batch
from lolcats.training.identity import layer_settings
from lolcats.training.losses import mean_over_real, output_error, weight_cross_entropy
from lolcats.training.stage import refuse_spread


class TransferStage:
    """Attention transfer for `train`.

    Args:
        model: a converted model; its weights are frozen here, the linearized layers' own parameters are trained. Layers
            without memory (on the meta device) are left out, but count in the loss, which is a mean over all.
        config: the stage's settings.
    """

    name = section = "transfer"

    def __init__(self, model: PreTrainedModel, config: TransferConfig) -> None:
        refuse_spread(model)
        self.model, self.config = model, config
        layers = linearized_layers(model)
        self.layers, self.divisor = [layer for layer in layers if not layer.is_meta], len(layers)
        model.requires_grad_(False)
        self._parameters = {name: p for name, p in added_parameters(model).items() if not p.is_meta}
        for parameter in self._parameters.values():
            parameter.requires_grad_()
        if not any(layer.mixer.learns for layer in self.layers):
            why = "these layers have nothing to learn by themselves" if self.layers else "call lolcats.convert first"
            raise LolcatsError(f"nothing to train in stage 1: expected layers that learn from the teacher; {why}")
        self.target = config.compared
        self.window: int | None = None
        for layer in self.layers:
            if self.target not in (targets := layer.mixer.targets):
                raise LolcatsError(f"transfer.target: expected one of {', '.join(targets)}; got {config.target!r}")

    @contextmanager
    def windowed(self, window: int | None) -> Iterator[None]:
        """Inside, what is compared with the teacher has this window; a learned score knows the layer's own alone."""
        before, self.window = self.window, window
        try:
            yield
        finally:
            self.window = before

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the linearization added, in all layers."""
        return self._parameters

    def origin(self) -> dict[str, Any]:
        """The settings of the layers and the teacher's weights."""
        gather = partial(whole_tensor, device=self.model.device)
        own = ((name, p) for name, p in self.model.named_parameters() if not (is_added(name) or p.is_meta))
        return {"linearization": layer_settings(self.model), "weights": weights_digest(own, gather)}

    def count(self, batch: Batch) -> int:
        """Real tokens of a batch."""
        return batch.tokens if batch.document is None else int((batch.document >= 0).sum())

    def backward(self, batch: Batch, share: float | Tensor) -> dict[str, Tensor]:
        """Run the teacher; each layer adds its gradient on the way."""
        return self._run(batch, share)

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The same errors without gradients."""
        return self._run(batch, None)

    def where(self, metrics: Mapping[str, Tensor]) -> str:
        """The first layer whose error, or loss where it has none, is not finite."""
        bad = (~metrics["layers"].isfinite()).nonzero()
        return f", first in layer {self.layers[int(bad[0])].layer_idx}" if len(bad) else ""

    def _run(self, batch: Batch, share: float | Tensor | None) -> dict[str, Tensor]:
        errors: list[Tensor] = []

        def observe(layer: LinearizedAttention, call: AttentionCall, teacher: Tensor) -> None:
            with torch.set_grad_enabled(share is not None):
                loss, *found = self._layer_loss(layer, call, teacher, batch.document)
                if share is not None and loss.requires_grad:  # a layer that keeps no pairs may have nothing to learn
                    (loss * (share / self.divisor)).backward()
            errors.append(torch.stack([loss.detach(), *(error.detach() for error in found)]))

        for layer in self.layers:
            layer.observer = observe
        try:
            with torch.no_grad():
                self._read(batch)
        finally:
            for layer in self.layers:
                layer.observer = None
        stacked = torch.stack(errors)
        means = {name: column.mean() for name, column in zip(("loss", "mse", "share"), stacked.unbind(1), strict=False)}
        return {**means, "layers": stacked[:, :2][:, -1]}

    def _read(self, batch: Batch) -> None:
        """Run the teacher."""
        self.model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

    def _layer_loss(
        self, layer: LinearizedAttention, call: AttentionCall, teacher: Tensor, document: Tensor | None
    ) -> list[Tensor]:
        """The loss, the error of the outputs, and for both parts that of the share.

        In training the loss alone where nothing learns from the output, which would cost more than what does learn.
        """
        if torch.is_grad_enabled() and not layer.mixer.output_learns:
            side = layer.mixer.side_loss(call)
            return [teacher.new_zeros((), dtype=torch.float32) if side is None else side]
        with layer.mixer.windowed(self.window):
            loss, *errors = self._transfer_loss(layer, call, teacher, document)
        side = layer.mixer.side_loss(call)
        return [loss if side is None else loss + side, *errors]

    def _transfer_loss(
        self, layer: LinearizedAttention, call: AttentionCall, teacher: Tensor, document: Tensor | None
    ) -> list[Tensor]:
        if self.target == "parts":
            parts = layer.mixer.parts(call)
            direction, share = (mean_over_real(x, document) for x in (parts.direction_error(), parts.share_error()))
            return [self.config.mse_factor * direction + share, direction, share]
        student = layer.mixer.target_output(call, self.target)
        error = output_error(student, teacher, document)
        loss = self.config.mse_factor * error
        if self.config.xent_factor:
            loss = loss + self.config.xent_factor * weight_cross_entropy(layer.mixer, call, document)
        return [loss, error]
