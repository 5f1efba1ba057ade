"""`convert`: put `LinearizedAttention` around the attention modules of a model, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.mixers import MIXERS
from lolcats.modeling.attention import linearized_layers
from lolcats.modeling.budget import find_split
from lolcats.modeling.calls import check_calls
from lolcats.modeling.hf import ADDED, mark_as_linearized
from lolcats.modeling.install import check_fits, give_split, install
from lolcats.modeling.modules import LOCAL, attention_modules, choose_layers, head_sizes, other_layers
from lolcats.modeling.plain import check_plain
from lolcats.modeling.rotary import check_rotations
from lolcats.modeling.settling import settle
from lolcats.modeling.sharing import check_sharing
from lolcats.modeling.start import start_from_text
from lolcats.models.context import context_limit
from lolcats.models.vocabulary import check_token_ids


def convert(
    model: PreTrainedModel,
    config: LinearizationConfig | None = None,
    *,
    input_ids: Tensor | None = None,
    decide: Callable[[Callable[[], list[Any]]], list[Any]] | None = None,
    seed: int | None = None,
    spread: bool = False,
) -> PreTrainedModel:
    """Replace softmax attention by a linear one, in place. No weight of the model changes.

    Args:
        model: a decoder-only language model of transformers.
        config: what to build; None is `LinearizationConfig()`.
        input_ids: [B, N] token ids of real text, needed where the layers start from text (`start="matched"`) or share a
            budget whose split is to be found; one batch is enough.
        decide: of several processes, does something in one of them and gives all what it returned; None: there is one.
        seed: of the new parameters' random start; torch's generator then stays as it was. None: they are drawn from it.
        spread: allow a model that was loaded with a `device_map`, to be run and not trained. What is added to a layer
            lies where the layer computes.

    Returns:
        The same object; its class is now a `Linearized...` subclass of its family's class.

    Raises:
        LolcatsError: the model cannot be linearized (the message says why, and nothing has changed), or `input_ids`
            is missing or holds tokens that the model does not know.
    """
    config = config or LinearizationConfig()
    if linearized_layers(model):
        raise LolcatsError("this model is already linearized; convert its teacher instead")
    check_plain(model, spread)
    check_supported(model)
    if config.starts_from_text and input_ids is None:
        key = "budget" if config.searches else "start"
        raise LolcatsError(
            f"{key}={config.model_dump()[key]!r} needs a batch of real text; pass input_ids [B, N] or use another {key}"
        )
    if input_ids is not None:
        check_token_ids(input_ids, model, "input_ids")
    with _drawn_from(seed):
        random = torch.get_rng_state()
        put_in_layers(model, config)
        if config.searches:
            assert input_ids is not None
            torch.set_rng_state(random)  # the layers start as those of settings that bring this split along
            config = _share_budget(model, config, input_ids, decide or (lambda action: action()))
    settle(model)
    if config.starts_from_text:
        assert input_ids is not None
        start_from_text(model, linearized_layers(model), input_ids)
    return model


def put_in_layers(model: PreTrainedModel, config: LinearizationConfig) -> None:
    """`convert` without what is found out from text; layers without memory get mixers that have none either.

    Raises:
        LolcatsError: see `convert`; nothing has changed.
    """
    _check_layers(model, config)  # refuse before anything changes
    mark_as_linearized(model, config)
    install(model, config)


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Random numbers of the CPU, where layers are made, come from a seed, if there is one, for a while."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _share_budget(
    model: PreTrainedModel,
    config: LinearizationConfig,
    input_ids: Tensor,
    decide: Callable[[Callable[[], list[Any]]], list[Any]],
) -> LinearizationConfig:
    """Give a converted model's layers the split that is found for them; the settings with it."""
    split = decide(lambda: find_split(model, config, input_ids))
    found = config.model_copy(update={"split": split})
    give_split(linearized_layers(model), found)
    model.config.linearization = found.model_dump(mode="json")  # type: ignore[attr-defined]
    return found


def check_supported(model: PreTrainedModel) -> None:
    """Raise LolcatsError if `model` cannot be linearized."""
    if linearized_layers(model):
        raise LolcatsError("this model is already linearized; convert its teacher instead")
    if getattr(model.config, "is_encoder_decoder", False):
        raise LolcatsError(f"{type(model).__name__} is an encoder-decoder; expected a decoder-only language model")
    if not model.can_generate():
        raise LolcatsError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    if not attention_modules(model):
        raise LolcatsError(f"{type(model).__name__} cannot be linearized: {_why_not(model)}")


def _check_layers(model: PreTrainedModel, config: LinearizationConfig) -> None:
    """Raise LolcatsError if one of the chosen layers cannot be linearized."""
    names, text_config = attention_modules(model), model.config.get_text_config(decoder=True)
    chosen = choose_layers(list(names), config.layers)
    check_sharing(text_config, chosen)
    sizes = {index: head_sizes(model.get_submodule(names[index]), text_config) for index in chosen}
    check_fits(config, sizes)
    if (limit := context_limit(model)) is not None and config.most_pairs > limit:
        raise LolcatsError(
            f"expected at most {limit:,} kept pairs, the tokens of the model's context (max_position_embeddings); got "
            f"{config.most_pairs:,}: lower linearization.kept.pairs"
        )
    if own := next((n for n, _ in model.named_parameters() if ADDED in n.split(".")), None):
        raise LolcatsError(
            f"{type(model).__name__} has a parameter {own}; the name {ADDED!r} is that of what a linearization adds"
        )
    if not any(tensor.is_meta for tensor in model.parameters()):
        check_calls(model, sizes)
        if MIXERS[config.mixer].needs_rotation:
            check_rotations(model, {index: names[index] for index in chosen})


def _why_not(model: PreTrainedModel) -> str:
    """Why a model has no attention module that can be taken over."""
    if other := other_layers(model):
        kinds = sorted(set(other.values()))
        if LOCAL.issuperset(kinds):
            return "all its attention layers are local (sliding window or chunks) already"
        return (
            f"its attention layers are of type {', '.join(kinds)}, which keep or choose more than the keys of a text; "
            "only layers of type full_attention are taken over"
        )
    classes = {type(module).__name__ for module in model.modules()}
    attention = ", ".join(sorted(name for name in classes if name.endswith(("Attention", "Mixer"))))
    return (
        f"its attention ({attention or 'of which it has none'}) does not go through transformers' attention interface, "
        "where linearization replaces it; expected a model such as Llama, Mistral or Qwen"
    )
