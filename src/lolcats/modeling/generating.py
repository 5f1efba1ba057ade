"""What linearized models do otherwise in `generate`: refusals, and what speculative decoding needs of a cache."""

from __future__ import annotations

from typing import Any, cast

from transformers import DynamicCache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from lolcats.errors import LolcatsError
from lolcats.modeling.attention import linearized_layers
from lolcats.modeling.cache import linearized_layer
from lolcats.modeling.taking_back import PartlyLinearizedCache


def generation_methods(base: type[PreTrainedModel]) -> dict[str, Any]:
    """Attributes of a linearized class, by name; `base` is that of its family."""

    def _no_pages(self: PreTrainedModel) -> None:
        raise AttributeError  # `transformers serve` looks whether it is there, and does without

    def refuse(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        raise LolcatsError(
            "continuous batching keeps keys in pages, which linearized layers do not have; call generate with a padded "
            "batch instead (left padding)"
        )

    def _validate_generation_mode(self: PreTrainedModel, mode: Any, generation_config: Any, kwargs: Any) -> None:
        check_generation(mode, generation_config)
        cast(Any, base)._validate_generation_mode(self, mode, generation_config, kwargs)

    def _prepare_cache_for_generation(
        self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, *args: Any
    ) -> None:
        cast(Any, base)._prepare_cache_for_generation(self, generation_config, model_kwargs, mode, *args)
        drafts = bool(getattr(generation_config, "is_assistant", False))
        if drafts or mode == GenerationMode.ASSISTED_GENERATION:
            record_past(self, model_kwargs.get("past_key_values"), drafts)

    return {
        "init_continuous_batching": property(_no_pages),
        "continuous_batching_context_manager": refuse,
        "_prepare_cache_for_generation": _prepare_cache_for_generation,
        "_validate_generation_mode": _validate_generation_mode,
    }


def check_generation(mode: str, generation_config: Any) -> None:
    """Refuse ways to generate that take back what a state cannot, before the first token is made.

    Raises:
        LolcatsError: contrastive search, or drafts by layers for several tokens (`use_mtp`).
    """
    if mode == GenerationMode.CONTRASTIVE_SEARCH:
        raise LolcatsError(
            "contrastive search goes on with several tokens in the place of one, which is not made for the state of a "
            "linearized model; leave out penalty_alpha"
        )
    if getattr(generation_config, "use_mtp", None):
        raise LolcatsError(
            "layers that predict several tokens (use_mtp) are not linearized and have not been tried with a linearized "
            "model; draft with assistant_model or prompt_lookup_num_tokens instead"
        )


def record_past(model: PreTrainedModel, cache: Any, drafts: bool) -> None:
    """Have the cache of a text that is going to be written keep what speculative decoding takes back.

    Args:
        model: a linearized model.
        cache: for it, maybe empty; None without one. Static ones are refused by transformers itself.
        drafts: whether the model drafts for another: then it makes steps of one token and takes back several.

    Raises:
        LolcatsError: the cache of a model that does not draft holds tokens already.
    """
    if type(cache) not in (DynamicCache, PartlyLinearizedCache):
        return
    if not drafts and (seen := cache.get_seq_length()) > 0:
        raise LolcatsError(
            f"assisted generation reads the whole text, also where a cache holds its beginning ({seen} tokens here); "
            "leave out past_key_values, or prompt_lookup_num_tokens, assistant_model and assistant_early_exit"
        )
    for attention in linearized_layers(model):
        if not cache.layers or attention.layer_idx < len(cache.layers):  # a draft by the first layers has fewer
            layer = linearized_layer(cache, attention.layer_idx)
            layer.record.long, layer.record.single = True, drafts
