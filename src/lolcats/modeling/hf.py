"""Linearized models as first-class models of transformers: saved and loaded like any other after `import lolcats`.

A linearized Llama is a `LinearizedLlamaForCausalLM`, a subclass of `LlamaForCausalLM` made when it is first needed;
its config is the family's own with `model_type: lolcats` and two more entries, `base_model_type` and `linearization`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from lolcats.config import LinearizationConfig, check_linearization
from lolcats.errors import LolcatsError
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.fused_prompts import prompts_of
from lolcats.modeling.generating import generation_methods
from lolcats.modeling.install import install
from lolcats.modeling.old_names import key_mapping, without_renaming
from lolcats.modeling.settling import settle

MODEL_TYPE = "lolcats"
ADDED = "mixer"
"""Name of the module under which everything lies that a linearization adds to an attention module."""


class LolcatsConfig(PretrainedConfig):
    """What AutoConfig finds for `model_type: lolcats`: builds the config of the right family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's config with the linearization in it.

        Raises:
            LolcatsError: the folder's config.json was not written by lolcats, or names an unknown family.
        """
        if cls is not LolcatsConfig:
            return super().from_dict(config_dict, **kwargs)
        family = config_dict.get("base_model_type")
        if not isinstance(family, str) or family not in CONFIG_MAPPING or "linearization" not in config_dict:
            raise LolcatsError(
                f"config.json says model_type 'lolcats' but has base_model_type {family!r} and "
                f"{'a' if 'linearization' in config_dict else 'no'} linearization; was it written by save_pretrained?"
            )
        check_linearization(config_dict["linearization"])
        return linearized_config_class(CONFIG_MAPPING[family]).from_dict(config_dict, **kwargs)


@functools.cache
def linearized_config_class(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """`LlamaConfig` -> `LinearizedLlamaConfig`."""
    attributes = {"model_type": MODEL_TYPE, "base_model_type": base.model_type, "__module__": __name__}
    new = type(f"Linearized{base.__name__}", (base,), attributes)
    model_class = linearized_model_class(_model_class(base), new)
    AutoModelForCausalLM.register(new, model_class, exist_ok=True)
    setattr(transformers, model_class.__name__, model_class)  # where `transformers serve` looks up `architectures`
    _convert_weights_as(_model_class(base), base.model_type, model_class)
    return new


def _convert_weights_as(base: type[PreTrainedModel], model_type: str, new: type[PreTrainedModel]) -> None:
    """Have transformers change names and shapes in files of a class as in those of its family (experts, for instance).

    It looks for what to do by the class's name and by `model_type`, and finds nothing by ours; but what it has loaded
    by the family's, it saves in the form that the family's files have.
    """
    own = get_checkpoint_conversion_mapping(base.__name__) or get_checkpoint_conversion_mapping(model_type)
    if own is not None:
        register_checkpoint_conversion_mapping(new.__name__, own, overwrite=True)


def _model_class(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    return cast(type[PreTrainedModel], AutoModelForCausalLM._model_mapping[config_class])


def linearized_model_class(base: type[PreTrainedModel], config: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """`LlamaForCausalLM` -> `LinearizedLlamaForCausalLM`, which builds its linearized layers itself."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        install(self, LinearizationConfig(**config.linearization))  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        kwargs["key_mapping"] = key_mapping() | (kwargs.get("key_mapping") or {})
        loaded = super(made, cls).from_pretrained(*args, **kwargs)  # type: ignore[misc]
        settle(loaded[0] if isinstance(loaded, tuple) else loaded)
        return without_renaming(loaded)

    def _apply(self: PreTrainedModel, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreTrainedModel:
        # half(), bfloat16() and to(dtype) come through here.
        added = {n: p.data for n, p in self.named_parameters() if is_added(n) and p.dtype == torch.float32}
        base._apply(self, fn, recurse)
        for name, parameter in self.named_parameters():
            if name in added and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = added[name].to(parameter.device)
        return self

    names = list(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            given = dict(zip(names, args, strict=False)) | kwargs
            for way in (graphs_of(self).step, prompts_of(self).run):
                if (output := way(self, base.forward, given)) is not None:
                    return output
        return base.forward(self, *args, **kwargs)

    strict = set(getattr(base, "_keep_in_fp32_modules_strict", None) or ()) | {ADDED}
    attributes = {
        "__init__": __init__,
        "from_pretrained": from_pretrained,
        "_apply": _apply,
        "forward": forward,
        "decodes_by_graphs": True,
        **generation_methods(base),
        "__module__": __name__,
        "config_class": config,
        "_keep_in_fp32_modules_strict": strict,
    }
    made = type(f"Linearized{base.__name__}", (base,), attributes)
    return made


def mark_as_linearized(model: PreTrainedModel, config: LinearizationConfig) -> None:
    """Give a model and its config their linearized classes, in place (weights and modules stay)."""
    model_config = copy.deepcopy(model.config)  # another model may share it
    if type(model_config) not in AutoModelForCausalLM._model_mapping:
        raise LolcatsError(f"{type(model_config).__name__} is not a causal language model that transformers knows")
    config_class = linearized_config_class(type(model_config))
    for module in model.modules():
        if getattr(module, "config", None) is model.config and module is not model:
            cast(Any, module).config = model_config
    model.config = model_config
    model_config.__class__ = config_class
    model_config.linearization = config.model_dump(mode="json")
    model_config.base_model_type = config_class.base_model_type  # type: ignore[attr-defined]
    model.__class__ = _model_class(config_class)
    model_config.architectures = [type(model).__name__]


def is_added(name: str) -> bool:
    """Whether a parameter of this name came with the linearization; such parameters stay float32."""
    return ADDED in name.split(".")


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of a linearized model's weights in place; what the linearization added stays float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_added(name):  # quantized weights are integers
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def __getattr__(name: str) -> Any:
    """Linearized classes by name: unpickling asks for them, maybe before they were made in this process."""
    base = getattr(transformers, name.removeprefix("Linearized"), None) if name.startswith("Linearized") else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return linearized_config_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return _model_class(linearized_config_class(cast(Any, base).config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register(MODEL_TYPE, LolcatsConfig, exist_ok=True)
