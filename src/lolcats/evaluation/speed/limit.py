"""The bytes that a decoding step must move, which bound its time whatever the kernels do.

A step reads all weights once, for however many texts, and of each text what its layers keep: the state of a linearized
layer, whole, of which the sums are written back, by some layers in one of many steps; keys and values of a softmax
layer, as far as it keeps them. The slot that a new token takes is left out, of windows as of keys and values. A table
of embeddings is looked up in, not read, unless it is the output's too. Of a mixture of experts all are counted, though
few texts may need fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lolcats.evaluation.facts import ModelFacts, describe
from lolcats.evaluation.memory import part_of
from lolcats.mixers import Mixer
from lolcats.modeling import linearized_layers


@dataclass(frozen=True)
class StepBytes:
    """What a step of a model moves."""

    weights: int
    rewritten: int
    """Of the state of one text, what is written at a token, in the mean over many."""
    facts: ModelFacts

    def text(self, tokens: int) -> int:
        """What one text of so many tokens takes."""
        return self.facts.own_bytes(tokens)

    def moved(self, batch: int, tokens: int) -> int:
        """What one more token of each of `batch` texts of `tokens` tokens moves."""
        return self.weights + batch * (self.text(tokens) + self.rewritten)


def step_bytes(model: PreTrainedModel) -> StepBytes:
    """Of a model in memory, linearized or not."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = getattr(table, "weight", None)
    if head is not None and getattr(head, "weight", None) is looked_up:
        looked_up = None
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p is not looked_up)
    rewritten = sum(_rewritten(layer.mixer, model.dtype) for layer in linearized_layers(model))
    return StepBytes(weights, rewritten, describe(model))


def _rewritten(mixer: Mixer, dtype: torch.dtype) -> int:
    """Of the state of one text in one layer: the length, and sums in one of so many steps."""
    spec = mixer.state_spec(dtype)
    sizes = {name: size for name, size in zip(spec.names, spec.sizes, strict=True) if part_of(name) == "state"}
    return sum(size if name == "length" else size // mixer.steps_a_write for name, size in sizes.items())
