"""`check_plain`: whether a model is nothing but its family's modules and weights, whole and in one place.

Conversion wraps modules in place and changes the model's class. What others put around a model or into it (adapters,
compiled code, processes, devices, hooks) would be lost at saving, or would lose what it relies on.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.models.sharded import sharded_by_us
from lolcats.placing import hooks_of

WRAPPERS = {
    "peft": "carries a peft adapter ({}), which would be lost; convert the model with the adapter merged into it: "
    "PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()",
    "torch._dynamo": "is compiled ({}); convert the model before torch.compile",
    "torch.nn.parallel": "is wrapped for several processes ({}); convert model.module before it is wrapped",
    "torch.distributed": "is spread over several processes ({}); convert the model before it is sharded",
    "deepspeed": "is spread over several processes ({}); convert the model before it is sharded",
    "accelerate": "is wrapped by accelerate ({}); convert the model before accelerator.prepare",
}
"""Package -> what its modules around or in a model mean."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_plain(model: nn.Module, spread: bool = False) -> None:
    """Refuse a model that others have put something around or into.

    Args:
        model: to be converted.
        spread: allow that accelerate keeps its parts in several places.

    Raises:
        LolcatsError: the message says what it is and what to do first. Nothing has been changed.
    """
    if sharded_by_us(model):
        return  # it was plain before
    for module in model.modules():
        for base in type(module).__mro__:
            package = next((name for name in WRAPPERS if f"{base.__module__}.".startswith(f"{name}.")), None)
            if package is not None:
                raise LolcatsError(f"this model {WRAPPERS[package].format(base.__name__)}")
    if not isinstance(model, PreTrainedModel):
        raise LolcatsError(f"expected a model of transformers (PreTrainedModel), got {type(model).__name__}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LolcatsError(f"this model {WRAPPERS['peft'].format('add_adapter')}")
    if not spread:
        _check_places(model)
    for name, module in model.named_modules():
        if not (spread and hooks_of(module)):
            _check_module(module, name or type(model).__name__)


def _check_places(model: PreTrainedModel) -> None:
    """All weights are there, in one place."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if absent := [name for name, tensor in tensors if tensor.device.type == "meta"]:
        raise LolcatsError(
            f"{len(absent)} of the model's weights are not in memory ({absent[0]}, on the meta device or offloaded); "
            "load the whole model on one device"
        )
    devices = sorted({str(tensor.device) for _, tensor in tensors})
    if len(devices) > 1 or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise LolcatsError(
            f"the model is split over several places (device_map; {', '.join(devices)}); load it on one device"
        )
    for name, tensor in tensors:
        if type(tensor.data).__module__.startswith("torch.distributed"):
            raise LolcatsError(f"this model {WRAPPERS['torch.distributed'].format(name)}")


def _check_module(module: nn.Module, name: str) -> None:
    """A module computes what its class says."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise LolcatsError(f"this model {WRAPPERS['torch._dynamo'].format(name)}")
    if "forward" in vars(module) or hasattr(module, "_hf_hook"):
        raise LolcatsError(
            f"{name} has another forward than its class (a device_map, torch.compile or a patch); give the model as it "
            "was loaded, on one device"
        )
    if parametrize.is_parametrized(module):
        raise LolcatsError(
            f"{name} has parametrized weights; remove them first: torch.nn.utils.parametrize.remove_parametrizations"
        )
    hooks = [hook for kind in HOOKS for hook in (getattr(module, kind, None) or {}).values()]
    # transformers hooks the embedding of models that are to be trained with gradient checkpointing.
    if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
        raise LolcatsError(f"{name} has hooks; remove them, convert, and register them again")
