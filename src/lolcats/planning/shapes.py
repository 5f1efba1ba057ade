"""What a plan needs to know of a model: the sizes of what its layers are made of, from its configuration alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.mixers import Mixer, Sizes
from lolcats.modeling.attention import LinearizedAttention, added_parameters
from lolcats.modeling.convert import check_supported
from lolcats.modeling.hf import is_added
from lolcats.modeling.install import install
from lolcats.modeling.modules import head_sizes, is_local, self_attention
from lolcats.models.empty import empty_model, known_model
from lolcats.models.folder import check_place, expand_model
from lolcats.models.shapes import SHAPES, config_of
from lolcats.training.lora import check_lora, lora_targets


@dataclass(frozen=True)
class Matrix:
    """A linear layer, or the same matrix of all experts."""

    inputs: int
    outputs: int
    numbers: int
    """Of all experts."""
    active: int = 1
    """Of how many experts each token passes through."""
    in_attention: bool = False
    adapted: bool = False
    """Whether stage 2 gives it LoRA."""


@dataclass(frozen=True)
class LayerShape:
    """A layer of the decoder."""

    matrices: tuple[Matrix, ...]
    norms: int
    normed: int
    """Numbers of a token that its norms read."""
    sizes: Sizes
    window: int | None
    """Tokens that its softmax attention sees, None for all."""
    mixer: Mixer | None
    """None where softmax attention stays."""
    numbers: int
    """Of its own weights."""
    added: int
    """Of what the linearization adds."""

    @property
    def query_size(self) -> int:
        """Numbers of a token's queries, and of the output of its attention."""
        return self.sizes.heads * self.sizes.head_dim

    @property
    def key_size(self) -> int:
        """Numbers of a token's keys, and of its values."""
        return self.sizes.kv_heads * self.sizes.head_dim

    @property
    def inner(self) -> int:
        """Numbers that a token's MLP works on one by one: gate and up together, where it has both."""
        outside = [m for m in self.matrices if not m.in_attention]
        return sum(m.active * m.outputs for m in outside if m.outputs != self.sizes.hidden_size)


@dataclass(frozen=True)
class ModelShape:
    """A linearized model."""

    name: str
    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    outside: int
    """Numbers of weights outside the layers: embeddings, the last norm, the head."""
    packed: int
    """Numbers of weights that quantization packs: linear layers but the head."""

    @property
    def numbers(self) -> int:
        """Of all of the model's own weights."""
        return self.outside + sum(layer.numbers for layer in self.layers)

    @property
    def added(self) -> int:
        """Of what the linearization adds."""
        return sum(layer.added for layer in self.layers)

    def adapters(self, rank: int) -> int:
        """Numbers of LoRA matrices."""
        sides = (m.inputs + m.outputs for layer in self.layers for m in layer.matrices if m.adapted)
        return rank * sum(sides)


def read_model(source: str) -> PreTrainedModel:
    """The empty model of a name of `SHAPES`, a config.json, or whatever `load_teacher` takes; float32, on meta.

    Raises:
        LolcatsError: there is no such configuration at hand, or no model can be made of it.
    """
    place = Path(expand_model(source))
    if place.name == "config.json":
        if not place.is_file():
            raise LolcatsError(f"no file {source}; expected the config.json of a model")
        source = str(place.parent)
    if source not in SHAPES and source != "demo" and not source.endswith(".gguf"):
        check_place(expand_model(source))
    try:
        if source in SHAPES or Path(expand_model(source)).is_dir():
            return empty_model(config_of(source), torch.float32)
    except LolcatsError:
        raise
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise LolcatsError(f"no model can be made of the configuration of {source}: {error}") from error
    if (model := known_model(source)) is None:
        raise LolcatsError(
            f"the configuration of {source!r} is not at hand; expected a folder with config.json, a config.json, a hub "
            f"name that this machine has or can reach, demo, or a shape: {', '.join(SHAPES)}"
        )
    return model


def linearized(teacher: PreTrainedModel, config: RunConfig, in_place: bool = False) -> PreTrainedModel:
    """An empty model with the layers of a run, whatever text would tell them left at its start.

    Args:
        teacher: an empty model.
        config: of the run.
        in_place: put the layers into `teacher` itself.

    Raises:
        LolcatsError: the model cannot be linearized with these settings.
    """
    check_supported(teacher)
    with torch.device("meta"):
        model = teacher if in_place else copy.deepcopy(teacher)
        install(model, config.linearization.without_text())
    return model


def shape_of(model: PreTrainedModel, config: RunConfig) -> ModelShape:
    """The sizes of what `linearized` gives.

    Raises:
        LolcatsError: LoRA cannot be put on the targets.
    """
    text = cast(Any, model.config.get_text_config(decoder=True))
    fine = config.finetune
    lora: set[str] = set()
    if fine.enabled and fine.method == "lora":
        check_lora(model, fine)
        lora = set(lora_targets(model, fine.targets))
    known: dict[Any, LayerShape] = {}
    layers = tuple(_shared(known, _layer_shape(model, name, text, lora)) for name in _layer_names(model))
    weights = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in added_parameters(model).values())
    head = model.get_output_embeddings()
    packed = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not is_added(name)
    )
    return ModelShape(
        str(text.name_or_path), layers, int(text.hidden_size), int(text.vocab_size),
        weights - sum(layer.numbers for layer in layers), packed,
    )  # fmt: skip


def distinct(layers: Sequence[LayerShape]) -> list[tuple[LayerShape, int]]:
    """Each layer once, with how many there are like it."""
    counts = Counter(map(id, layers))
    return [(layer, counts[key]) for key, layer in {id(layer): layer for layer in layers}.items()]


def _shared(known: dict[Any, LayerShape], layer: LayerShape) -> LayerShape:
    """The first layer of the same sizes, if there is one: what is counted for it need not be counted again."""
    mixer = layer.mixer
    told = None if mixer is None else (type(mixer), mixer.settings, getattr(mixer, "split", None))
    return known.setdefault((replace(layer, mixer=None), told), layer)


def _layer_names(model: PreTrainedModel) -> list[str]:
    """Names of the decoder's layers, those without attention too: the entries of the list that attention is in."""
    found = [name for name, module in model.named_modules() if isinstance(module, LinearizedAttention)]
    parts = found[0].split(".")
    number = next(place for place, part in enumerate(parts) if part.isdecimal())
    stack = ".".join(parts[:number])
    return [f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children()]


def _layer_shape(model: PreTrainedModel, name: str, text: Any, lora: set[str]) -> LayerShape:
    layer = model.get_submodule(name)
    wrapped = next((m for m in layer.modules() if isinstance(m, LinearizedAttention)), None)
    attention = next(iter(self_attention(layer)), None)
    inner = wrapped.inner if wrapped is not None else None if attention is None else attention[2]
    sizes = Sizes(0, 0, 0, 0, int(text.hidden_size)) if inner is None else head_sizes(inner, text)
    local = inner is not None and is_local(inner, int(cast(Any, inner).layer_idx))
    window = getattr(text, "sliding_window", None) if local else None
    inside = set() if inner is None else set(inner.modules())
    norms = [m for key, m in layer.named_modules() if "norm" in type(m).__name__.lower() and not is_added(key)]
    own = sum(p.numel() for key, p in layer.named_parameters() if not is_added(key))
    return LayerShape(
        tuple(_matrices(layer, name, inside, text, lora)), len(norms), sum(_normed(m, sizes) for m in norms), sizes,
        window, None if wrapped is None else wrapped.mixer, own,
        sum(p.numel() for key, p in layer.named_parameters() if is_added(key)),
    )  # fmt: skip


def _normed(norm: nn.Module, sizes: Sizes) -> int:
    """Numbers of a token that a norm reads; one of the size of a head reads all query heads, at most."""
    size = max((p.numel() for p in norm.parameters()), default=sizes.hidden_size)
    return size * sizes.heads if size == sizes.head_dim else size


def _matrices(layer: nn.Module, name: str, inside: set[nn.Module], text: Any, lora: set[str]) -> Iterator[Matrix]:
    """Linear layers, and parameters of three dimensions, which are those of experts."""
    for key, module in layer.named_modules():
        if is_added(key):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            first, second = module.weight.shape
            inputs, outputs = (second, first) if isinstance(module, nn.Linear) else (first, second)
            yield Matrix(inputs, outputs, first * second, 1, module in inside, f"{name}.{key}" in lora)
        for p in module.parameters(recurse=False):
            if p.ndim == 3:
                experts, *sides = p.shape
                chosen = int(getattr(text, "num_experts_per_tok", None) or experts)
                outputs, inputs = sides if sides[1] == text.hidden_size else sides[::-1]
                yield Matrix(inputs, outputs, p.numel(), min(chosen, experts))
