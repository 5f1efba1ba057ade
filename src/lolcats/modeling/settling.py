"""Linearized models whose weights accelerate keeps in several places."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from lolcats.modeling.attention import linearized_layers
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.placing import computes_on, is_spread, kept_value

try:
    from accelerate.hooks import remove_hook_from_module
except ImportError:  # then no model is spread
    remove_hook_from_module = None


def settle(model: PreTrainedModel) -> None:
    """Make a linearized model that was loaded with a `device_map` run like any other.

    What the linearization added is brought into memory where its layer computes: it is small, and read in many places
    beside the forward pass. Steps are not recorded, since weights come and go in them.
    """
    if not is_spread(model):
        return
    graphs_of(model).enabled = False
    for layer in linearized_layers(model):
        for module in layer.mixer.modules():
            _stay(module)


def _stay(module: nn.Module) -> None:
    device = computes_on(module)
    if device is None or remove_hook_from_module is None:
        return
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    values = {name: kept_value(module, name) for name, tensor in own if tensor.is_meta}
    remove_hook_from_module(module)
    for name, value in values.items():
        held = getattr(module, name)
        value = value.to(device, held.dtype)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=held.requires_grad)
        else:
            module._buffers[name] = value
