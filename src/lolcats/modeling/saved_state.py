"""The state of a text that was read, as a file: a long document is read once and asked about many times.

    with torch.no_grad():
        cache = model(document, use_cache=True).past_key_values
    save_state(cache, "document.safetensors", model)

    cache = load_state("document.safetensors", model)
    answer = model.generate(**continue_from(cache, question), max_new_tokens=100)

The file has every tensor of every layer by its name, such as `layers.3.near.ring.k`; layers that keep softmax attention
have `layers.3.keys` and `layers.3.values`. Its metadata say which model read the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lolcats.errors import LolcatsError
from lolcats.files import atomic_file
from lolcats.identity import network_identity
from lolcats.mixers import Mixer, StateSpec, map_state, state_tensors
from lolcats.mixers.state import state_names
from lolcats.modeling.attention import linearized_layers
from lolcats.modeling.cache import LinearizedLayer
from lolcats.modeling.taking_back import refuse_first

VERSION = "1"
"""Of the format."""
MARK = "lolcats_state"
"""The entry of the metadata that has it."""
SOFTMAX = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers' cache that hold keys and values and nothing else."""
EMPTY = "DummyLayer"
"""One that holds nothing: the layer uses the keys of another."""
AGAIN = "load the model that read the text, or read the text again with this one"


class LayerFacts(NamedTuple):
    """What a file says of one layer of the cache, beside its tensors."""

    kind: str
    """Class of the layer."""
    seen: int
    """Tokens read, padding counted."""
    whole: bool = True
    """See `LinearizedLayer.advance`."""


class StateFacts(NamedTuple):
    """What a file says of itself."""

    model: str
    """`network_identity` of the model that read the text."""
    dtype: str
    """Of that model."""
    tokens: int
    """Tokens read, padding counted."""
    layers: list[LayerFacts]


def save_state(cache: Cache, path: str | Path, model: PreTrainedModel, *, overwrite: bool = False) -> None:
    """Write what a linearized model keeps of the texts that it has read.

    Args:
        cache: the `DynamicCache` with which they were read, one text a row.
        path: of the file; it appears only when it is complete.
        model: what read them.
        overwrite: whether a file that is there already may be replaced.

    Raises:
        LolcatsError: the file is there already or cannot be written; or the cache is empty, of another kind, or does
            not fit the model.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise LolcatsError(f"{path} is there already; choose another name, or pass overwrite=True to replace it")
    tensors, layers = _collect(cache, _mixers(model), model.dtype)
    tokens = max(layer.seen for layer in layers)
    facts = StateFacts(network_identity(model), str(model.dtype), tokens, layers)
    text = json.dumps(facts._replace(layers=[layer._asdict() for layer in layers])._asdict())  # type: ignore[list-item]
    metadata = {MARK: VERSION, "facts": text, "digest": _digest(text, tensors)}
    with atomic_file(path, apart=True) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata)


@torch.no_grad()
def load_state(path: str | Path, model: PreTrainedModel) -> DynamicCache:
    """The cache that `save_state` wrote, where the model's layers are.

    Going on with it gives what going on with the one that was saved gives, bit for bit on the same device. `generate`
    changes it in place; `continue_from` hands out copies.

    Raises:
        LolcatsError: the file cannot be read, is damaged or no state, or is the state of another model.
    """
    path = Path(path)
    facts, tensors = _read(path)
    mixers, where = _mixers(model), f"{path} does not fit this model:"
    _check_model(facts, mixers, str(model.dtype), where)
    cache, devices = DynamicCache(config=model.config), _devices(model)
    for index, layer in enumerate(facts.layers):
        held = _of_layer(tensors, index, devices.get(index, model.device))
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        if index in mixers:
            new = _linearized(held, layer, mixers[index], model.dtype, f"{where} layer {index}")
        else:
            new = _softmax(held, layer, cache.layers[index], f"{where} layer {index}")
        cache.layers[index] = new
    if len(mixers) < len(facts.layers):
        refuse_first(cache)
    if facts.model != network_identity(model):  # after the layers, of which more can be said
        raise LolcatsError(f"{where} the text was read by one with other weights or settings; {AGAIN}")
    return cache


def _check_model(facts: StateFacts, mixers: Mapping[int, Mixer], dtype: str, where: str) -> None:
    """Raise LolcatsError where a file is of a model in another number format or with other linearized layers."""
    if facts.dtype != dtype:
        raise LolcatsError(
            f"{where} the text was read in {facts.dtype}, and this model is in {dtype}; load the model with "
            f"dtype={facts.dtype}, or read the text again"
        )
    found = [index for index, layer in enumerate(facts.layers) if layer.kind == LinearizedLayer.__name__]
    if found != sorted(mixers):
        raise LolcatsError(f"{where} the linearized layers are {found}, expected {sorted(mixers)}; {AGAIN}")


def _mixers(model: PreTrainedModel) -> dict[int, Mixer]:
    """The layers of a model that keep a state, by their index."""
    found = {layer.layer_idx: layer.mixer for layer in linearized_layers(model)}
    if not found:
        raise LolcatsError(f"expected a linearized model; {type(model).__name__} has no linearized layer")
    return found


def _collect(
    cache: Cache, mixers: Mapping[int, Mixer], dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[LayerFacts]]:
    """The tensors of a cache by name, on the CPU, and what else is to be known of its layers."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        held, facts = _tensors_of(layer, index)
        layers.append(facts)
        if (facts.kind == LinearizedLayer.__name__) != (index in mixers) and held:
            raise LolcatsError(f"the cache does not fit the model: layer {index} is a {facts.kind}")
        if index in mixers and held:
            _check(held, mixers[index].state_spec(dtype), f"the cache does not fit the model: layer {index}")
        for name, tensor in held.items():
            # A copy each: parts of one tensor cannot be written.
            tensors[f"layers.{index}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    missing = [i for i in mixers if i >= len(layers) or layers[i].seen == 0]
    if missing:
        raise LolcatsError(f"expected a cache with which a text was read; layer {missing[0]} holds nothing")
    return tensors, layers


def _tensors_of(layer: Any, index: int) -> tuple[dict[str, Tensor], LayerFacts]:
    """What one layer of a cache holds."""
    kind = type(layer).__name__
    if type(layer) is LinearizedLayer:
        names, tensors = state_names(layer.state), state_tensors(layer.state)
        return dict(zip(names, tensors, strict=True)), LayerFacts(kind, layer.seen, layer.whole)
    if kind == EMPTY:
        return {}, LayerFacts(kind, 0)
    if kind not in SOFTMAX:
        raise LolcatsError(
            f"expected the DynamicCache with which a text was read; layer {index} of the cache is a {kind}, which "
            "cannot be saved"
        )
    seen = int(layer.get_seq_length())
    return {"keys": layer.keys, "values": layer.values} if seen else {}, LayerFacts(kind, seen)


def _check(held: Mapping[str, Tensor], spec: StateSpec, where: str) -> None:
    """Raise LolcatsError where the tensors of a layer are others than its mixer keeps."""
    expected = dict(zip(spec.names, spec.shapes, strict=True))
    for name in sorted(expected.keys() ^ held.keys()):
        raise LolcatsError(f"{where} {'lacks' if name in expected else 'has no'} {name}; {AGAIN}")
    for name, shape in expected.items():
        if held[name].shape[1:] != shape:
            raise LolcatsError(f"{where} has {name} of {list(held[name].shape[1:])}, expected {list(shape)}; {AGAIN}")


def _linearized(
    held: dict[str, Tensor], facts: LayerFacts, mixer: Mixer, dtype: torch.dtype, where: str
) -> LinearizedLayer:
    """A layer of the cache from its tensors."""
    form = mixer.empty_state(1, dtype)
    _check(held, StateSpec.of(form), where)
    in_order = iter([held[name] for name in state_names(form)])
    layer = LinearizedLayer()
    layer.advance(map_state(form, lambda _: next(in_order)), facts.seen, facts.whole)
    return layer


def _softmax(held: dict[str, Tensor], facts: LayerFacts, place: Any, where: str) -> Any:
    """A layer of the cache from its keys and values; `place` is an empty one as the model has it."""
    if facts.kind == DynamicLayer.__name__:  # also of a sliding window, in a cache that was made without a config
        place = DynamicLayer()
    if type(place).__name__ != facts.kind or sorted(held) not in ([], ["keys", "values"]):
        raise LolcatsError(f"{where} is a {facts.kind}, expected {type(place).__name__}; {AGAIN}")
    if held:
        place.lazy_initialization(held["keys"], held["values"])
        place.keys, place.values = held["keys"], held["values"]
        if hasattr(place, "cumulative_length"):
            place.cumulative_length = facts.seen
    return place


def _read(path: Path) -> tuple[StateFacts, dict[str, Tensor]]:
    """A file's content, which is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: the cache is written to, and the file may be replaced meanwhile.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LolcatsError(f"cannot read the state {path}: {getattr(error, 'strerror', None) or error}") from error
    if (version := metadata.get(MARK)) != VERSION:
        why = "holds no state that save_state wrote" if version is None else f"has format {version}, expected {VERSION}"
        raise LolcatsError(f"{path} {why}; save the state again with this version of lolcats")
    text = metadata.get("facts", "")
    if metadata.get("digest") != _digest(text, tensors):
        raise LolcatsError(f"{path} is damaged: its content has changed since it was written; read the text again")
    facts = json.loads(text)
    return StateFacts(**facts | {"layers": [LayerFacts(**layer) for layer in facts["layers"]]}), tensors


def _of_layer(tensors: Mapping[str, Tensor], index: int, device: torch.device) -> dict[str, Tensor]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): x.to(device) for name, x in tensors.items() if name.startswith(prefix)}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of all that a file holds; tells damage, is no proof against forgery."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where the weights of each layer's attention are; without those that are brought only when they are needed."""
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and weight is not None and weight.device.type != "meta":
            found.setdefault(index, weight.device)
    return found
