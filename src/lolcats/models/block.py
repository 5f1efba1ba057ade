"""A model of which only some decoder layers have weights: what one block of layers needs, and nothing else in memory.

All layers stay in their places, so that indices, kinds of layers and masks are the whole model's. Those outside the
block have no memory (they are on the meta device) and hand on what they are given. In front of the block stands the
residual stream as the whole model has it there, which whoever calls the block brings along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from lolcats.errors import LolcatsError
from lolcats.models.config import read_model_config
from lolcats.models.empty import empty_model
from lolcats.models.layers import decoder_layers
from lolcats.models.quantization import Quantization, keep_differentiable, quantization_config
from lolcats.models.teacher import explained
from lolcats.models.weights import check_complete, check_finite


class Part(NamedTuple):
    """Which weights a block has: those of decoder layers [first, last), and what stands before and behind all."""

    first: int
    last: int
    embeddings: bool = False
    head: bool = False
    """Also the embeddings, which many heads share."""


class Block:
    """Decoder layers of a model, from the residual stream in front of them to that behind them.

    Args:
        model: the whole model; layers outside `part` may be without weights, and are never run from here on.
        part: the layers, `first` < `last` where the block is called.
    """

    def __init__(self, model: PreTrainedModel, part: Part) -> None:
        self.model, self.part = model, part
        self._given: Tensor | None = None
        self._left: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        layers = decoder_layers(model)[1]
        self._others = [layer for index, layer in enumerate(layers) if not part.first <= index < part.last]
        for index, layer in enumerate(layers):
            if layer in self._others:
                layer.forward = self._passing(index)
        if part.first < part.last:
            self._hooks.append(layers[part.last - 1].register_forward_hook(self._keep))

    def close(self) -> None:
        """Give all layers of a model with all weights back what they do."""
        for layer in self._others:
            del layer.forward
        for hook in self._hooks:
            hook.remove()

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None, hidden: Tensor | None) -> Tensor:
        """The residual stream [B, N, d_model] behind the block.

        Args:
            input_ids: [B, N]; they are read by the first block alone, the others take their shape.
            position_ids: [B, N] where texts are kept apart.
            hidden: [B, N, d_model], the stream in front of the block; None for the first.
        """
        with self.given(hidden):
            self._left.clear()
            self.model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            return self._left.pop()

    @contextmanager
    def given(self, hidden: Tensor | None) -> Iterator[None]:
        """Inside, the stream in front of the block is `hidden`, however the model is called."""
        before, self._given = self._given, hidden
        try:
            yield
        finally:
            self._given = before

    def _passing(self, index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_args: Any, **_others: Any) -> Tensor:
            return hidden_states if self._given is None or index != self.part.first - 1 else self._given

        return forward

    def _keep(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise LolcatsError(
                f"{type(self.model).__name__} cannot be trained block by block: expected decoder layers that return "
                f"hidden states, got {type(output).__name__}; set transfer.blocks.size to null"
            )
        self._left.append(output)


class _Blank(nn.Module):
    """Stands for embeddings that a block does not read: zeros of their shape."""

    def __init__(self, like: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.dtype = like.embedding_dim, dtype

    def forward(self, input_ids: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=input_ids.device).expand(*input_ids.shape, self.width)


def load_block(
    source: str,
    part: Part,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
) -> Block:
    """Read the weights of one part of a model from its safetensors shards, tensor by tensor.

    Args:
        source: a folder or a hub name.
        part: what is read; nothing else ever is in memory.
        dtype, device, quantization: as for `load_teacher`.

    Raises:
        LolcatsError: as `load_teacher`; only what is read is looked at.
    """
    options: dict[str, Any] = {"dtype": dtype or "auto", "device_map": {"": str(device)}}
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
    with explained(source):
        config = read_model_config(source)
        loaded = _part_class(type(empty_model(config)), part).from_pretrained(
            source, config=config, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            use_safetensors=True, **options,
        )  # fmt: skip
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    check_complete(found, source)
    if quantization != "none":
        keep_differentiable(model)
    _put_back(model)
    check_finite(model, source)
    return Block(model.eval(), part)


def _part_class(base: type[PreTrainedModel], part: Part) -> type[PreTrainedModel]:
    """A subclass of a family's class, made with nothing in the places of what is not read."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        outside = _take_out(self, part)
        self.__dict__["outside"] = {name: module for name, module in outside.items() if module is not None}
        own, prefix = self._keys_to_ignore_on_load_unexpected or (), self.base_model_prefix
        names = [re.escape(name.removeprefix(f"{prefix}.")) for name in outside]
        self._keys_to_ignore_on_load_unexpected = {*own, *(rf"^({prefix}\.)?{name}\." for name in names)}

    name = f"Part{base.__name__}"
    tied = base._tied_weights_keys if part.head else None  # type: ignore[attr-defined]
    made = type(name, (base,), {"__init__": __init__, "__module__": __name__, "_tied_weights_keys": tied})
    if (own := get_checkpoint_conversion_mapping(base.__name__)) is not None:
        register_checkpoint_conversion_mapping(name, own, overwrite=True)
    return made


def _take_out(model: PreTrainedModel, part: Part) -> dict[str, nn.Module | None]:
    """Put empty modules in the places of what is not read; their names, with the layers that were there."""
    prefix, layers = decoder_layers(model)
    outside: dict[str, nn.Module | None] = {
        f"{prefix}.{n}": layer for n, layer in enumerate(layers) if not part.first <= n < part.last
    }
    names = {module: name for name, module in model.named_modules()}
    for name in outside:
        model.set_submodule(name, nn.Identity())
    if not part.head and isinstance(head := model.get_output_embeddings(), nn.Module):
        model.set_submodule(names[head], nn.Identity())
        outside[names[head]] = None
    embeddings = model.get_input_embeddings()
    if not (part.head or part.embeddings) and isinstance(embeddings, nn.Embedding):
        model.set_submodule(names[embeddings], _Blank(embeddings, embeddings.weight.dtype))
        outside[names[embeddings]] = None
    return outside


def _put_back(model: PreTrainedModel) -> None:
    """Put the layers that were not read back in their places, without memory."""
    for name, layer in model.__dict__.pop("outside").items():
        model.set_submodule(name, layer.to("meta"))
