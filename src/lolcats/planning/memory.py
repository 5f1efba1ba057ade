"""Bytes that a GPU holds at the peak of a stage, from the sizes of the model's layers.

Of activations those tensors are counted that autograd keeps for the backward pass, as transformers' layers make them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lolcats.config import RunConfig
from lolcats.planning.hardware import GIB
from lolcats.planning.mixers import held_for_backward
from lolcats.planning.shapes import LayerShape, ModelShape
from lolcats.training.losses import HEAD_CHUNK

PACKED = {"none": 2.0, "8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / 64 / 256}
"""Bytes of a number of a linear layer: NF4 has a byte for 64 numbers, and four for 256 of these bytes."""
TRAINED = 16
"""Bytes of a trained number: itself, its gradient and two moments, all float32."""
LOGIT, LOGIT_KL = 14, 22
"""Bytes of a logit while the loss is computed: in bfloat16, in float32, its logarithm, the gradient; the teacher's."""
BESIDE = 1.0 * GIB
"""Of CUDA itself and of libraries' workspaces."""
WASTE = 0.05
"""Share of a GPU's memory that lies between tensors, and cannot be used."""
GATHERED = 2
"""Layers that are whole at a time where weights are sharded or come from the host: one computes, the next arrives."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    trained: float
    """Trained parameters, their gradients and moments."""
    activations: float
    logits: float = 0.0
    host: float = 0.0
    """Bytes in the memory of the host, for this GPU."""

    @property
    def tensors(self) -> float:
        """What torch allocates, at the peak."""
        return self.weights + self.trained + self.activations + self.logits

    def needed(self) -> float:
        """GiB that a GPU must have."""
        return (self.tensors + BESIDE) / (1 - WASTE) / GIB


def weight_bytes(model: ModelShape, quantization: str, layers: slice | None = None, width: float = 2.0) -> float:
    """Of the model's own weights, or of some of its layers alone."""
    if layers is None:
        return width * (model.numbers - model.packed) + packed_width(quantization, width) * model.packed
    chosen = model.layers[layers]
    packed = sum(m.numbers for layer in chosen for m in layer.matrices)
    return width * (sum(x.numbers for x in chosen) - packed) + packed_width(quantization, width) * packed


def packed_width(quantization: str, width: float = 2.0) -> float:
    """Bytes of a number of a linear layer."""
    return width if quantization == "none" else PACKED[quantization]


def transfer_memory(
    model: ModelShape, config: RunConfig, rows: int, quantization: str, layers: slice | None = None
) -> Memory:
    """Stage 1 on `rows` sequences at once, of the whole model or of a block with its own weights alone."""
    tokens, length = rows * config.data.sequence_length, config.data.sequence_length
    chosen = model.layers if layers is None else model.layers[layers]
    at_once = max(_passing(layer) for layer in chosen) * tokens + unpacked(model, quantization)
    if config.transfer.xent_factor:
        at_once += 20.0 * rows * max(layer.sizes.heads for layer in chosen) * length**2
    trained = float(TRAINED * sum(layer.added for layer in chosen))
    return Memory(weight_bytes(model, quantization, layers), trained, at_once)


def finetune_memory(
    model: ModelShape,
    config: RunConfig,
    rows: int,
    quantization: str,
    *,
    ranks: int = 1,
    shard: bool = False,
    checkpointing: bool = False,
    offload: bool = False,
) -> Memory:
    """Stage 2 on `rows` sequences at once on each of `ranks` GPUs."""
    fine, tokens = config.finetune, rows * config.data.sequence_length
    full = fine.method == "full"
    width = 4.0 if full else 2.0
    weights = weight_bytes(model, quantization, width=width) * (2 if full and fine.follows_teacher else 1)
    trained = (12 if full else TRAINED) * trained_numbers(model, config)
    host = 0.0
    if shard or offload:
        whole = GATHERED * max(layer.numbers for layer in model.layers) * packed_width(quantization, width)
        part = weights / ranks
        host, kept = (part, 0.0) if offload else (0.0, part)
        weights, trained = kept + whole, trained / ranks
    held = [_held(layer, fine.rank) for layer in model.layers]
    carried = 2.0 * model.hidden
    a_token = carried * len(held) + max(held) if checkpointing else sum(held)
    if fine.error_factor:  # what the teacher's layers give and what the student's do
        a_token += sum(2 * 2.0 * layer.query_size for layer in model.layers if layer.mixer is not None)
    once = max(_passing(layer) for layer in model.layers)
    logits = (LOGIT_KL if fine.kl_factor else LOGIT) * min(HEAD_CHUNK, tokens) * model.vocabulary
    return Memory(
        weights, trained, tokens * (a_token + 3 * carried) + unpacked(model, quantization),
        max(float(logits), once * tokens), host,
    )  # fmt: skip


def trained_numbers(model: ModelShape, config: RunConfig) -> int:
    """Parameters that stage 2 trains."""
    fine = config.finetune
    own = model.numbers if fine.method == "full" else model.adapters(fine.rank)
    return own + (model.added if fine.train_feature_maps else 0)


def unpacked(model: ModelShape, quantization: str) -> float:
    """The largest linear layer written out, where weights are packed."""
    if quantization == "none":
        return 0.0
    return 2.0 * max(m.inputs * m.outputs for layer in model.layers for m in layer.matrices)


def _passing(layer: LayerShape) -> float:
    """Bytes of a token while it passes a layer without a backward pass through it; the larger of MLP and attention."""
    stream = 4.0 * layer.sizes.hidden_size
    attention = 4.0 * layer.query_size + 4.0 * layer.key_size + 2.0 * layer.query_size
    if layer.mixer is not None:
        attention += 14.0 * layer.query_size + held_for_backward(layer.mixer)
    return stream + max(4.0 * layer.inner, attention)


def _held(layer: LayerShape, rank: int) -> float:
    """Bytes of a token that a layer keeps for its backward pass."""
    adapted = [m for m in layer.matrices if m.adapted]
    inputs = {(m.in_attention, m.inputs) for m in adapted}  # queries, keys and values read the same tensor
    mixer = 0.0 if layer.mixer is None else held_for_backward(layer.mixer)
    attended = 4.0 * (layer.query_size + layer.key_size) + mixer
    return (
        4.0 * layer.normed + attended + 3.0 * layer.inner + 2.0 * sum(size for _, size in inputs)
        + 2.0 * rank * len(adapted)
    )  # fmt: skip
