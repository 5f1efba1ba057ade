"""A stage whose steps are recorded once as a CUDA graph and then replayed.

A step of a small model is hundreds of kernels, each of which takes Python and the driver longer to launch than the GPU
to run. A graph launches all of them at once. Shapes must stay the same: batches of another shape, texts that are kept
apart, long ones that are read in parts, and steps with another window than the layer's own run as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from lolcats.errors import first_line
from lolcats.modeling.passes import unseen_values
from lolcats.training.batches import Batch

if TYPE_CHECKING:
    from lolcats.training.stage import Stage

EAGER_STEPS = 3
"""Steps before the recording: kernels are compiled and libraries make their workspaces in them."""


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """Tell transformers and our layers that no row is packed: else they ask the device, which a recording cannot.

    In a recording transformers assumes that all are packed.
    """
    module: Any = masking_utils
    find = getattr(module, "find_packed_sequence_indices", None)
    if find is not None:
        module.find_packed_sequence_indices = lambda position_ids: None
    try:
        with unseen_values():
            yield
    finally:
        if find is not None:
            module.find_packed_sequence_indices = find


@dataclass
class _Recording:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    share: Tensor
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]


class GraphedStage:
    """`stage`, with its `backward` replayed from a CUDA graph; a `Stage` itself."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.name, self.section = stage, stage.name, stage.section
        self._parameters = stage.parameters()
        self._recording: _Recording | None = None
        self._seen = 0
        self._window: int | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return self._parameters

    def origin(self) -> dict[str, Any]:
        """As the stage says."""
        return self.stage.origin()

    @contextmanager
    def windowed(self, window: int | None) -> Iterator[None]:
        """As the stage does; a recording holds the layers' own window."""
        before, self._window = self._window, window
        try:
            with self.stage.windowed(window):
                yield
        finally:
            self._window = before

    def count(self, batch: Batch) -> float:
        """As the stage counts."""
        return self.stage.count(batch)

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """As the stage does."""
        return self.stage.validate(batch)

    def where(self, metrics: Mapping[str, Tensor]) -> str:
        """As the stage says."""
        return self.stage.where(metrics)

    def backward(self, batch: Batch, share: float | Tensor) -> dict[str, Tensor]:
        """Add `share` times the gradient of the batch; return metrics."""
        cut = batch.document is not None or batch.chunk is not None
        if cut or self._window is not None or batch.input_ids.device.type != "cuda":
            return self.stage.backward(batch, share)
        recording = self._recording
        if recording is not None and recording.batch.input_ids.shape == batch.input_ids.shape:
            return self._replay(recording, batch, share)
        self._seen += 1
        if self._seen == EAGER_STEPS + 1 and self._try_to_record(batch):
            return self.backward(batch, share)
        return self.stage.backward(batch, share)

    def _try_to_record(self, batch: Batch) -> bool:
        try:
            self._recording = self._record(batch)
        except RuntimeError as error:  # what the model does cannot be in a graph: a question to the device, say
            warnings.warn(f"{self.name} runs without CUDA graphs, which is slower: {first_line(error)}", stacklevel=2)
            return False
        return True

    def _record(self, batch: Batch) -> _Recording:
        static = Batch(batch.input_ids.clone(), batch.loss_mask.clone(), None, None)
        share = torch.ones((), device=batch.input_ids.device)
        before = {name: p.grad for name, p in self._parameters.items()}
        for p in self._parameters.values():
            p.grad = None  # so that the graph writes gradients and does not add to them
        torch.clear_autocast_cache()  # weights that were cast before the recording would never be cast again
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with one_text_a_row(), torch.cuda.graph(graph):
                metrics = self.stage.backward(static, share)
            gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        finally:
            torch.clear_autocast_cache()
            for name, p in self._parameters.items():
                p.grad = before[name]
        return _Recording(graph, static, share, metrics, gradients)

    def _replay(self, recording: _Recording, batch: Batch, share: float | Tensor) -> dict[str, Tensor]:
        recording.batch.input_ids.copy_(batch.input_ids)
        recording.batch.loss_mask.copy_(batch.loss_mask)
        recording.share.copy_(torch.as_tensor(share))
        recording.graph.replay()
        for name, gradient in recording.gradients.items():
            p = self._parameters[name]
            p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)
        return {name: value.clone() for name, value in recording.metrics.items()}
