"""What can be known of a model from its configuration: layers, parameters, bytes. Its weights are not read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.evaluation.memory import TextMemory, text_memory
from lolcats.modeling import linearized_layers
from lolcats.modeling.attention import added_parameters
from lolcats.modeling.check import plain_attention
from lolcats.modeling.convert import check_supported
from lolcats.modeling.head import FAILURES, probe_ids
from lolcats.modeling.modules import attention_modules, head_sizes, is_local, self_attention
from lolcats.models.config import read_model_config
from lolcats.models.empty import empty_model
from lolcats.models.folder import check_place, expand_model
from lolcats.models.teacher import load_teacher
from lolcats.printable import reason


@dataclass
class ModelFacts:
    """What `lolcats inspect` tells."""

    name: str
    """Class of the model."""
    dtype: str
    layers: int
    linearized: list[int]
    """Indices of the linearized layers."""
    candidates: list[int]
    """Indices of the softmax layers that could be linearized."""
    obstacle: str
    """Why the model cannot be linearized, "" if it can or is."""
    parameters: int = 0
    added: int = 0
    """Parameters that the linearization added."""
    impl: str = ""
    memory: TextMemory | None = None
    """Of the linearized layers, for one text of any length."""
    kv_rates: dict[int, tuple[int, int | None]] = field(default_factory=dict)
    """Layer index -> (bytes per token, most tokens kept) of each layer with keys and values, as softmax attention."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the linearized layers' state."""
        return 0 if self.memory is None else self.memory.bytes

    def softmax_bytes(self, tokens: int) -> int:
        """Bytes of keys and values after `tokens` tokens, were every layer softmax attention."""
        return sum(rate * min(tokens, limit or tokens) for rate, limit in self.kv_rates.values())

    def own_bytes(self, tokens: int) -> int:
        """Bytes that this model holds: the state, and keys and values of the layers that stay softmax."""
        rest = [pair for index, pair in self.kv_rates.items() if index not in self.linearized]
        return self.state_bytes + sum(rate * min(tokens, limit or tokens) for rate, limit in rest)


def read_facts(source: str) -> ModelFacts:
    """Facts of the model at `source`, built without memory for its weights (a GGUF file is loaded).

    Raises:
        LolcatsError: there is no model, or its configuration cannot be read.
    """
    if source == "demo" or source.endswith(".gguf"):
        return describe(load_teacher(source)[0])
    source = expand_model(source)
    check_place(source)
    config = read_model_config(source)
    try:
        model = empty_model(config)
    except (ValueError, KeyError, ImportError) as error:
        kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "no causal language model"
        layers = int(getattr(config, "num_hidden_layers", 0))
        name = type(config).__name__.removesuffix("Config")
        if isinstance(error, LolcatsError):
            raise
        if type(config) in AutoModelForCausalLM._model_mapping:
            raise LolcatsError(
                f"no model can be built from config.json of {source!r}: {type(error).__name__}: {reason(error)}"
            ) from error
        return ModelFacts(name, "-", layers, [], [], f"{name} is {kind} that transformers can load as such")
    return describe(model)


def describe(model: PreTrainedModel) -> ModelFacts:
    """Facts of a model in memory or on the meta device."""
    layers = linearized_layers(model)
    config = model.config.get_text_config(decoder=True)
    facts = ModelFacts(
        name=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=int(config.num_hidden_layers),
        linearized=[layer.layer_idx for layer in layers],
        candidates=[],
        obstacle="",
        parameters=sum(p.numel() for p in model.parameters()),
        added=sum(p.numel() for p in added_parameters(model).values()),
        impl=", ".join(sorted({layer.mixer.impl for layer in layers})),
        memory=text_memory(model),
        kv_rates=kv_rates(model),
    )
    if not layers:
        try:
            check_supported(model)
            facts.candidates = list(attention_modules(model))
        except LolcatsError as error:
            facts.obstacle = str(error)
    return facts


def kv_rates(model: PreTrainedModel) -> dict[int, tuple[int, int | None]]:
    """Layer index -> (bytes per token, most tokens kept) of what the plain model's cache holds after a short text.

    Empty where that cannot be told: experts chosen from values do not run on the meta device.
    """
    cache, tokens = DynamicCache(config=model.config), 2
    try:
        with torch.no_grad(), plain_attention(model):
            model(input_ids=probe_ids(model, tokens), past_key_values=cache, use_cache=True)
    except (*FAILURES, NotImplementedError):
        return announced_rates(model)
    rates = {}
    for index, layer in enumerate(cache.layers):
        kept = [
            t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, torch.Tensor)
        ]
        if any(t.numel() for t in kept):
            held = sum(t.numel() * t.element_size() for t in kept)
            rates[index] = (held // tokens, getattr(layer, "sliding_window", None))
    return rates


def announced_rates(model: PreTrainedModel) -> dict[int, tuple[int, int | None]]:
    """The same from the configuration of the attention modules, where the model does not run."""
    config, rates = model.config.get_text_config(decoder=True), {}
    for index, _, module in self_attention(model):
        try:
            sizes = head_sizes(module, config)
        except LolcatsError:
            return {}
        limit = None
        if is_local(module, index):
            limit = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
        width = next(module.parameters()).element_size()
        rates[index] = (sizes.kv_heads * (sizes.head_dim + sizes.value_dim) * width, limit)
    return rates
