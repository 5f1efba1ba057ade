"""How a decoding step is recorded: as a CUDA graph. Tests, which have no GPU, bring a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

Step = Callable[[], ModelOutput]
Recorder = Callable[[Step], tuple[ModelOutput, Callable[[], None]]]
"""Records a step, which it may run: what the step returns, and what makes it anew in the same tensors."""


def record_cuda(step: Step) -> tuple[ModelOutput, Callable[[], None]]:
    """A step as a CUDA graph."""
    before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        # A stream of its own: by it a recording has its own memory for products, and replays may run side by side.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            output = step()
    finally:
        torch.cuda.set_stream(before)  # where a recording fails, torch leaves its own stream the current one
    return output, graph.replay


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
