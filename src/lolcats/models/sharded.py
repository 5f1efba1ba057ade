"""A model whose decoder layers are spread over processes by torch's `fully_shard` (FSDP2).

Each process holds its rows of every weight of a decoder layer. A layer is whole while it is computed, forward and
backward, and nowhere else; what is outside the layers stays whole everywhere, for it is used outside the model's
forward too (the loss makes its logits a few thousand tokens at a time). Only where those weights are trained and not
tied are they spread as well.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.models.layers import decoder_layers

_ours: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Placed(NamedTuple):
    """Where a parameter is in a model; tied ones are in several places."""

    module: nn.Module
    name: str


def check_torch() -> None:
    """Refuse a torch without what is needed.

    Raises:
        LolcatsError: it is too old.
    """
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: F401
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        known = False
    else:
        known = "ignored_params" in inspect.signature(fully_shard).parameters
        known = known and hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
    if not known:
        raise LolcatsError(
            f"finetune.sharding needs a later torch than {torch.__version__} (fully_shard; 2.11 has all of it); "
            "install one, or set finetune.sharding.enabled=false"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's layers are spread over processes."""
    return any(hasattr(module, "set_reshard_after_backward") for module in model.modules())


def sharded_by_us(model: nn.Module) -> bool:
    """Whether `shard` made a model what it is."""
    return model in _ours


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is spread, in place; any other tensor itself."""
    return cast(Any, tensor).to_local() if is_shard(tensor) else tensor


def whole_tensor(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor that is spread, gathered on `device` (None: where its part is) in every process; any other one itself.

    All processes must call it for the same tensor.
    """
    if not is_shard(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    spread = cast(DTensor, tensor)
    part = spread.to_local()
    moved = DTensor.from_local(
        part if device is None else part.to(device), spread.device_mesh, spread.placements, run_check=False,
        shape=spread.shape, stride=spread.stride(),
    )  # fmt: skip
    return moved.full_tensor()


def own_rows(whole: Tensor, shard: Tensor) -> Tensor:
    """The rows of `whole` that this process has of `shard`, a tensor of the same shape; all of any other tensor."""
    if not is_shard(shard):
        return whole
    spread = cast(Any, shard)
    size, rank, rows = spread.device_mesh.size(), spread.device_mesh.get_local_rank(), spread.shape[0]
    height = -(-rows // size)
    return whole[min(rows, rank * height) : min(rows, (rank + 1) * height)]


def empty_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Take the weights out of a model, by name, so that what is left can be sent to other processes.

    What bitsandbytes packed in 4 bits becomes an ordinary tensor of bytes; its layer keeps the scales.
    """
    taken: dict[str, Tensor] = {}
    for name, places in _places(model).items():
        parameter = places[0].module._parameters[places[0].name]
        assert parameter is not None
        taken[name] = parameter.detach().as_subclass(Tensor)
        empty = nn.Parameter(torch.empty_like(taken[name], device="meta"), requires_grad=False)
        for place in places:
            setattr(place.module, place.name, empty)
    return taken


def shard(
    model: PreTrainedModel,
    weight_of: Callable[[str], Tensor] | None,
    device: torch.device,
    *,
    trained: bool = False,
    cpu_offload: bool = False,
) -> PreTrainedModel:
    """Spread an empty model over all processes, layer by layer: no process has more than one layer whole.

    Args:
        model: without its weights, see `empty_weights`.
        weight_of: gives process 0 each weight by its name, once, when it is its turn; None in all others.
        device: where this process computes.
        trained: the weights of the model will be trained; they become float32.
        cpu_offload: the parts of the layers are kept in the memory of the CPU.

    Raises:
        LolcatsError: a weight cannot be split.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "offload_policy": policy}
    places = _places(model)
    _move_rest(model, device)
    parts, whole = _parts(model, trained)
    for part in [*parts, model]:  # last, what no part holds
        _fill_all(part, places, weight_of, device, trained)
        if part is model:
            break
        ignored = {p for p in part.parameters() if not is_shard(p)} if part in whole else set()
        fully_shard(part, ignored_params=cast(Any, ignored), **options)
        if trained:
            _sum_gradients(part)
    _fetch_early(list(decoder_layers(model)[1]))
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:  # peft asks the weight, not the layer
            vars(module.weight).update(compress_statistics=state.nested, quant_type=state.quant_type)
    _ours.add(model)
    return model


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Bring to the device what a model has beside its weights: buffers, and scales of packed weights."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        if (state := getattr(module, "quant_state", None)) is not None:
            cast(Any, state).to(device)


def _parts(model: PreTrainedModel, trained: bool) -> tuple[list[nn.Module], list[nn.Module]]:
    """What is spread, inner modules first, and of these what keeps its own weights whole.

    The decoder is among them even so: it has FSDP know the order of the layers, by which it fetches the next one early.
    """
    head, decoder = model.get_output_embeddings(), cast(nn.Module, model.base_model)
    tied = isinstance(head, nn.Module) and bool({*head.parameters()} & {*decoder.parameters()})
    layers = list(decoder_layers(model)[1])
    if trained and not tied and isinstance(head, nn.Module):
        return [*layers, head, decoder], []
    return [*layers, decoder], [decoder]


def _places(model: nn.Module) -> dict[str, list[Placed]]:
    """Where each parameter is, by its first name."""
    found: dict[int, tuple[str, list[Placed]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{path}.{name}" if path else name
                found.setdefault(id(parameter), (full, []))[1].append(Placed(module, name))
    return dict(found.values())


def _fill_all(
    part: nn.Module,
    places: Mapping[str, list[Placed]],
    weight_of: Callable[[str], Tensor] | None,
    device: torch.device,
    trained: bool,
) -> None:
    """Put the weights of a part of a model, which process 0 has, into their places in all processes."""
    below = {id(p) for p in part.parameters()}
    for name, where in places.items():
        empty = where[0].module._parameters[where[0].name]
        if empty is None or id(empty) not in below or not empty.is_meta:
            continue
        own = None if weight_of is None else weight_of(name).to(device).contiguous()
        data = torch.empty_like(empty, device=device) if own is None else own
        if dist.get_world_size() > 1:
            dist.broadcast(data, 0)
        learns = trained and data.is_floating_point()
        filled = nn.Parameter(data.float() if learns else data, requires_grad=learns)
        for place in where:
            setattr(place.module, place.name, filled)


def _fetch_early(layers: list[nn.Module]) -> None:
    """Have each layer ask for the next one's weights before it is computed.

    Else these are asked for when Python comes to the next layer, which is too late where it is Python that a GPU waits
    for. On the way back FSDP asks early by itself.
    """
    for layer, following in itertools.pairwise(layers):
        cast(Any, layer).set_modules_to_forward_prefetch([following])


def _sum_gradients(part: nn.Module) -> None:
    """Have FSDP add up gradients: shares of the loss already divide by what all processes count."""
    module = cast(Any, part)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
