"""What a family hands to transformers' attention interface, found by watching one forward pass before anything changes.

The hook (`attention.mixer_interface`) takes queries, keys, values, a mask, a scale, a cap and learned sinks. A family
that hands over more (biases of positions, chosen indices, a window) would be computed wrongly without it, so whatever
is not known is refused by its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lolcats.errors import LolcatsError
from lolcats.mixers import Sizes
from lolcats.modeling.head import FAILURES, probe_ids, relative_error, tolerance

WATCH = "lolcats_watch"
"""Name of the attention function that only looks."""
KNOWN = {"scaling", "softcap", "s_aux", "linearized"}
"""Arguments that the hook honours."""
HARMLESS = {
    "dropout",  # a regularizer of training; the conversion trains without it
    "position_ids", "cache_position", "use_cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
    "num_items_in_batch", "deterministic", "is_causal",  # the last is asked of the model: `check_calls`
}  # fmt: skip
"""Arguments that change no attention output, or say again what the mask says."""


class WatchedCall(NamedTuple):
    """One call of the interface."""

    layer: int
    module: str
    sizes: tuple[int, int, int]
    """Query heads, key heads, and size of queries and keys."""
    unknown: tuple[str, ...]
    causal: bool
    """Whether the family says that the call is causal; if not, its mask may be."""


def unknown_facts(handed: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what a family hands over beyond what the hook honours."""
    return tuple(n for n, v in handed.items() if n not in KNOWN and n not in HARMLESS and _says_something(v))


def _says_something(value: Any) -> bool:
    """Whether a value could change attention: no objects on their way to somebody else (generate's tokenizer)."""
    if isinstance(value, dict):
        return any(_says_something(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_says_something(item) for item in value)
    return isinstance(value, Tensor | int | float | str) and value is not False


def refuse_unknown(module: nn.Module, handed: Mapping[str, Any]) -> None:
    """Raise LolcatsError where the family hands over what linearized attention cannot honour."""
    if names := unknown_facts(handed):
        raise LolcatsError(_unknown(type(module).__name__, names))


def check_calls(model: PreTrainedModel, sizes: Mapping[int, Sizes]) -> None:
    """Watch a forward pass of the plain model and refuse what the hook could not take over.

    Args:
        model: the model with its weights, not converted.
        sizes: of each layer that is to be converted, by index, as its configuration tells them.

    Raises:
        LolcatsError: a layer that calls the interface never or several times, or whose call has other sizes or facts.
    """
    calls = watch_calls(model)
    name, counts = type(model).__name__, Counter(call.layer for call in calls)
    for index in sizes:
        if counts[index] != 1:
            raise LolcatsError(
                f"{name} cannot be linearized: expected one call of the attention interface per forward pass in layer "
                f"{index}; it makes {counts[index]}. Leave the layer out with `layers` if others do with one"
            )
    chosen = [call for call in calls if call.layer in sizes]
    if (order := [call.layer for call in chosen]) != sorted(order):
        raise LolcatsError(f"{name} cannot be linearized: its layers run in the order {order}, not one after the other")
    if not all(call.causal for call in chosen) and not is_causal(model):
        raise LolcatsError(
            f"{name} cannot be linearized: a later token changes its earlier logits; expected a causal decoder (some "
            "encoders are one with is_decoder=True, if they were trained so)"
        )
    for call in chosen:
        if call.unknown:
            raise LolcatsError(f"{name} cannot be linearized: {_unknown(call.module, call.unknown)}")
        if call.sizes != (expected := tuple(sizes[call.layer][:3])):
            raise LolcatsError(
                f"{name} cannot be linearized: layer {call.layer} should have {expected} query heads, "
                f"key heads and head size by its configuration; its attention works with {call.sizes}"
            )


def _unknown(module: str, names: Sequence[str]) -> str:
    return (
        f"{module} hands {', '.join(names)} to its attention function, which linearized attention does not know; leave "
        "such layers out with `layers`"
    )


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether changing the last token of a text changes no earlier logits of the model."""
    ids = probe_ids(model)
    one, two = (
        model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, torch.cat([ids[:, :-1], ids[:, :1]], 1))
    )
    return relative_error(one, two) <= tolerance(one.dtype)


@torch.no_grad()
def watch_calls(model: PreTrainedModel) -> list[WatchedCall]:
    """All calls of the attention interface in one forward pass of a few tokens, in order."""
    was_training = model.training
    calls: list[WatchedCall] = []
    try:
        model.eval()
        with _watching(model, calls):
            model(input_ids=probe_ids(model), use_cache=False)
    except FAILURES as error:
        if isinstance(error, LolcatsError):
            raise
        raise LolcatsError(
            f"{type(model).__name__} cannot run a text of a few tokens: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(was_training)
    return calls


@contextmanager
def _watching(model: PreTrainedModel, calls: list[WatchedCall]) -> Iterator[None]:
    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **handed: Any
    ) -> tuple[Tensor, None]:
        sizes = (query.shape[1], key.shape[1], query.shape[3])
        index = int(getattr(module, "layer_idx", None) or 0)
        causal = handed.get("is_causal", getattr(module, "is_causal", True)) is not False
        calls.append(WatchedCall(index, type(module).__name__, sizes, unknown_facts(handed), causal))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(WATCH, watch)
    with attention_named(model, WATCH):
        yield


@contextmanager
def attention_named(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, all modules of `model` take the attention function of this name, whatever each of them took before."""
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(config, "_attn_implementation_internal", None) for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


AttentionMaskInterface.register(WATCH, lambda *args, **kwargs: None)
