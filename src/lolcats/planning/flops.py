"""Arithmetic and bytes of a step of each stage, counted from the sizes of the model's layers.

A product of [M, K] and [K, N] is 2 M K N operations. Weights are frozen, so a backward pass through a linear layer is
one product as large as the forward one, for the gradient of its input. What lies between the products is counted in
bytes that kernels of torch read and write: the constants say for how many numbers of what.

Legend: M tokens of a step (B rows of N), r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator

from lolcats.config import RunConfig
from lolcats.planning.mixers import mixer_work
from lolcats.planning.shapes import LayerShape, Matrix, ModelShape, distinct
from lolcats.planning.work import Work

NORM, NORM_BACK = 36, 76
"""Bytes for each number that an RMS norm of transformers reads: to float32, square, mean, product, back, product."""
RESIDUAL, RESIDUAL_BACK = 12, 12
"""For each number of the residual stream: two sums in a layer."""
INNER, INNER_BACK = 5, 9
"""For each number of the gate and the up projection: the activation, and its product."""
ROTARY, ROTARY_BACK = 20, 26
"""For each number of queries and keys: rotated by halves."""
OUTPUT, OUTPUT_BACK = 4, 4
"""For each number of the attention's output: brought into the order of the next product."""
ERROR = 60
"""For each number of outputs that are compared with the teacher: to float32, difference, square, mean, and back."""
XENT = 750
"""For each pair of tokens and head, where attention weights are compared (fitted: those of both, and back)."""
LOGIT, LOGIT_KL = 40, 66
"""For each logit: to float32, log softmax, loss and gradient; with those of the teacher beside."""
ADAMW = 40
"""For each trained parameter: gradient norm, parameter, gradient and two moments."""
NORM_KERNELS, LAYER_KERNELS, BACK = 7, 20, 2.0
"""Kernels of a norm and of the rest of a layer beside its products; and how many more a backward pass has."""
EDGE = 128
"""A product takes as long as one whose shorter side is so much longer: tiles begin and end, and are not full."""
FULL_HEAD = 128
"""Numbers of a head with which exact attention has its full speed; shorter ones have more exponentials a product."""
SOFTMAX_BACK = 2.5
"""Arithmetic of the backward pass of exact attention in that of its forward pass."""


def transfer_step(model: ModelShape, config: RunConfig, rows: int, layers: slice = slice(None)) -> list[Work]:
    """Stage 1 on `rows` sequences, without the optimiser; of the layers of a block alone where it is one."""
    return [
        piece.times(count)
        for layer, count in distinct(model.layers[layers])
        for piece in _transferred(layer, config, rows)
    ]


def teacher_step(model: ModelShape, rows: int, length: int, layers: slice = slice(None)) -> list[Work]:
    """The teacher's hidden states of `rows` sequences, after some of its layers."""
    return [
        piece.times(count)
        for layer, count in distinct(model.layers[layers])
        for piece in (*forward(layer, rows * length), *exact_attention(layer, rows, length))
    ]


def finetune_step(model: ModelShape, config: RunConfig, rows: int, checkpointing: bool = False) -> list[Work]:
    """Stage 2 on `rows` sequences, without the optimiser; with checkpointing each layer is computed twice."""
    length, fine = config.data.sequence_length, config.finetune
    pieces = teacher_step(model, rows, length) if fine.follows_teacher else []
    for layer, count in distinct(model.layers):
        pieces += [piece.times(count) for piece in _tuned(layer, config, rows, checkpointing)]
    return pieces + head_loss(model, rows * length, fine.kl_factor > 0)


def optimizer_step(trained: int, layers: int) -> list[Work]:
    """Clipping and AdamW, fused; `trained` parameters of so many layers."""
    return [Work("bytes", bytes=ADAMW * trained, kernels=4.0 * layers)]


def _transferred(layer: LayerShape, config: RunConfig, rows: int) -> Iterator[Work]:
    """A layer in stage 1."""
    length, mixer = config.data.sequence_length, layer.mixer
    yield from forward(layer, rows * length)
    yield from exact_attention(layer, rows, length)
    if mixer is None:
        return
    yield from mixer_work(mixer, rows, length, "transfer")
    if mixer.output_learns:
        yield Work("bytes", bytes=ERROR * rows * length * layer.query_size, kernels=20)
    if config.transfer.xent_factor:
        yield Work("bytes", bytes=XENT * rows * layer.sizes.heads * length**2, kernels=20)


def _tuned(layer: LayerShape, config: RunConfig, rows: int, checkpointing: bool) -> Iterator[Work]:
    """A layer in stage 2."""
    length, fine = config.data.sequence_length, config.finetune
    tokens = rows * length
    once = [*forward(layer, tokens), *_adapters(layer, tokens, fine.rank)]
    if layer.mixer is None:
        exact = list(exact_attention(layer, rows, length))
        once += exact
        yield from (piece.times(SOFTMAX_BACK) for piece in exact)
    else:
        yield from mixer_work(layer.mixer, rows, length, "finetune")
        yield from mixer_work(layer.mixer, rows, length, "forward") if checkpointing else []
        if fine.error_factor:
            yield Work("bytes", bytes=ERROR * tokens * layer.query_size, kernels=20)
    yield from once
    yield from once if checkpointing else []
    yield from backward(layer, tokens, fine.method == "full")
    yield from _adapters_back(layer, tokens, fine.rank)


def forward(layer: LayerShape, tokens: int) -> Iterator[Work]:
    """All of a layer but its attention."""
    for matrix in layer.matrices:
        yield _product(matrix, tokens)
    moved = NORM * layer.normed + RESIDUAL * layer.sizes.hidden_size + INNER * layer.inner
    moved += ROTARY * (layer.query_size + layer.key_size) + OUTPUT * layer.query_size
    yield Work("bytes", bytes=tokens * moved, kernels=NORM_KERNELS * layer.norms + LAYER_KERNELS)


def backward(layer: LayerShape, tokens: int, full: bool = False) -> Iterator[Work]:
    """The same backward; with gradients of the weights themselves where all of them are trained."""
    for matrix in layer.matrices:
        yield _product(matrix, tokens).times(2 if full else 1)
    moved = NORM_BACK * layer.normed + RESIDUAL_BACK * layer.sizes.hidden_size + INNER_BACK * layer.inner
    moved += ROTARY_BACK * (layer.query_size + layer.key_size) + OUTPUT_BACK * layer.query_size
    yield Work("bytes", bytes=tokens * moved, kernels=BACK * (NORM_KERNELS * layer.norms + LAYER_KERNELS))


def exact_attention(layer: LayerShape, rows: int, length: int) -> Iterator[Work]:
    """Softmax attention of a layer, as the teacher has it: half of the pairs of a text, or those of its window."""
    if layer.sizes.heads:
        seen = length / 2 if layer.window is None else min(layer.window, length / 2)
        sides = layer.sizes.head_dim + layer.sizes.value_dim
        slowness = max(1.0, FULL_HEAD / layer.sizes.head_dim)
        yield Work("attention", 2.0 * rows * length * seen * layer.sizes.heads * sides, slowness=slowness, kernels=2)


def head_loss(model: ModelShape, tokens: int, teacher: bool) -> list[Work]:
    """Logits, loss and the gradient of the hidden states, and the teacher's logits."""
    product = _product(Matrix(model.hidden, model.vocabulary, model.hidden * model.vocabulary), tokens)
    moved = float(LOGIT_KL + LOGIT if teacher else LOGIT) * tokens * model.vocabulary
    return [product.times(3 if teacher else 2), Work("bytes", bytes=moved, kernels=30)]


def _product(matrix: Matrix, tokens: int) -> Work:
    """A linear layer: each token passes through its active experts, and all weights are read once."""
    passed = tokens * matrix.active
    moved = 2.0 * (passed * (matrix.inputs + matrix.outputs) + matrix.numbers)
    slowness = 1 + EDGE / min(matrix.inputs, matrix.outputs)
    return Work("matmul", 2.0 * passed * matrix.inputs * matrix.outputs, moved, slowness)


def _adapters(layer: LayerShape, tokens: int, rank: int) -> Iterator[Work]:
    """LoRA: two thin products, a scale and a sum, all bound by what they move."""
    for m in layer.matrices:
        if m.adapted:
            sides = m.inputs + m.outputs
            yield Work("matmul", 2.0 * tokens * rank * sides, tokens * (2.0 * m.inputs + 12 * m.outputs), kernels=4)


def _adapters_back(layer: LayerShape, tokens: int, rank: int) -> Iterator[Work]:
    for m in layer.matrices:
        if m.adapted:
            sides = m.inputs + m.outputs
            yield Work("matmul", 4.0 * tokens * rank * sides, tokens * (10.0 * m.inputs + 8 * m.outputs), kernels=8)
