"""`LinearizedAttention`: a family's own attention module whose attention itself is replaced by a mixer.

The family computes q, k, v (norms, biases, RoPE) and the output projection as ever. In transformers 5 it calls the
attention function named by its config in between; the wrapper gives it a config that names `mixer_interface` and
passes itself along as a keyword, so nothing of any family is copied here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache

from lolcats.errors import LolcatsError
from lolcats.mixers import Call, Mixer, Rotation, equal_window
from lolcats.mixers.blend import BlendMixer
from lolcats.mixers.softmax import capped_softmax
from lolcats.mixers.window import share_map
from lolcats.modeling.cache import LinearizedLayer, linearized_layer, past_of, to_device
from lolcats.modeling.calls import refuse_unknown
from lolcats.modeling.facts import read_facts, read_texts
from lolcats.modeling.handover import AttentionCall, Handover
from lolcats.modeling.masks import NAME, TokenFacts, plain_tensor, softmax_mask
from lolcats.modeling.old_names import ADDED_BY_0_1, new_name
from lolcats.modeling.passes import check_first_visit
from lolcats.modeling.rotary import RotaryFinder
from lolcats.modeling.taking_back import HeldCall

SOFTMAX, FULL, EQUAL_WINDOW = "softmax", "full", "equal_window"
"""Modes of every linearized layer: its teacher, its mixer as it is, and a plain window of the bytes of its state, of
the mean state where layers share a budget."""
COMMON_MODES = (SOFTMAX, FULL, EQUAL_WINDOW)
"""A mixer names the others that it has."""
ALIASES = {"hybrid": FULL}
"""Names of modes in version 0.1."""
CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""Names under which families hand the cache to their attention module."""

Observer = Callable[["LinearizedAttention", AttentionCall, Tensor], None]
"""Called with the layer, the call and the softmax output [B, H, N, Dv]; see `training.transfer`."""
Listener = Callable[["LinearizedAttention", Tensor], None]
"""Called with the layer and what it gives, [B, H, N, Dv], in whatever mode; see `training.layer_errors`."""


class LinearizedAttention(nn.Module):
    """A mixer in the place of the attention inside a family's attention module.

    Args:
        inner: the family's module; its weights are never changed here.
        mixer: what computes the attention; all that a linearization adds to a model is in it.
    """

    mixer: Mixer

    def __init__(self, inner: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        self.inner = inner
        self.mixer = mixer
        self.mode = FULL
        self.observer: Observer | None = None
        self.listener: Listener | None = None
        self.model_config: PretrainedConfig | None = None
        self.window_tokens: dict[torch.dtype, int] = {}
        """Where layers share a budget, tokens of the window that takes as much in all of them together."""
        self._window: dict[torch.dtype, BlendMixer] = {}
        self.memory_dtype: torch.dtype | None = None
        self.rotary = RotaryFinder()

    def __getattr__(self, name: str) -> Any:
        """What version 0.1 put beside the family's module is the mixer's."""
        return getattr(self.mixer, name) if name in ADDED_BY_0_1 else super().__getattr__(name)

    @property
    def layer_idx(self) -> int:
        """Index of the layer in the model."""
        return int(self.inner.layer_idx)  # type: ignore[arg-type]

    @property
    def is_meta(self) -> bool:
        """Whether the family's module has no memory: its layer is not one of those that were read."""
        return any(tensor.is_meta for tensor in self.inner.parameters())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in [n for n in state_dict if n.startswith(prefix) and new_name(n) != n]:
            state_dict[new_name(name)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_sizes(self, q: Tensor, k: Tensor) -> None:
        """Raise LolcatsError where q [B, H, N, D] or k [B, KV, N, D] are not what the mixer was made for."""
        sizes = self.mixer.sizes
        expected = (sizes.heads, sizes.kv_heads, sizes.head_dim)
        if (q.shape[1], k.shape[1], q.shape[3]) != expected or k.shape[3] != sizes.head_dim:
            raise LolcatsError(
                f"expected {expected[0]} query heads and {expected[1]} key heads of size {expected[2]}; "
                f"{type(self.inner).__name__} gives queries {tuple(q.shape)} and keys {tuple(k.shape)}; leave this "
                "layer out with `layers`"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's forward; its cache is kept from it, because the mixer keeps a state of its own."""
        name = next((n for n in CACHE_ARGUMENTS if n in kwargs), CACHE_ARGUMENTS[0])
        cache: Cache | None = kwargs.pop(name, None)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        backend = getattr(self.model_config, "_attn_implementation", None) or NAME
        past = past_of(cache, self.layer_idx, hidden.shape[1])
        embeddings = kwargs.get("position_embeddings")
        rotation = self._rotation(args, {name: None, **kwargs}) if self.mixer.needs_rotation else None
        reach = None if rotation is None else self.rotary.reach(rotation, kwargs.get("position_ids"))
        handover = Handover(self, hidden, cache, past, embeddings, backend, rotation, reach)
        if self.mode == SOFTMAX and self.observer is None:
            handover.cache = None
            return self.inner(*args, **{name: cache}, linearized=handover, **kwargs)
        return self.inner(*args, **{name: None}, linearized=handover, **kwargs)

    def _rotation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rotation | None:
        return None if self.mode == SOFTMAX else self.rotary.find(self.inner, args, kwargs)

    def dispatch(self, call: AttentionCall, handover: Handover) -> Tensor:
        """Output [B, H, N, Dv] of the layer in its present mode."""
        cache = handover.cache
        if self.observer is not None:
            teacher = self.softmax(call)
            self.observer(self, call, teacher)
            return teacher
        if self.mode == SOFTMAX:
            return self.softmax(call)
        if cache is None:
            mixer, mode = self._acting(call)
            return mixer(call, mode=mode)[0]
        layer = linearized_layer(cache, self.layer_idx)
        check_first_visit(handover.rotary, layer, self.layer_idx)
        return self._with_cache(call, layer)

    def _with_cache(self, call: AttentionCall, layer: LinearizedLayer) -> Tensor:
        outs = [self._advance(part, layer) for part in layer.record.parts(call)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _advance(self, call: Call, layer: LinearizedLayer) -> Tensor:
        if layer.state is not None:
            layer.state = to_device(layer.state, call.q.device)
        mixer, mode = self._acting(call)
        layer.record.prepare(HeldCall(mixer, mode, call, layer.point))
        out, state = mixer(call, layer.state, keep=True, mode=mode)
        layer.advance(state, call.q.shape[2], whole=call.padding is None and call.segments is None)
        return out

    def window(self, dtype: torch.dtype) -> Mixer:
        """The plain window of as many bytes as the mixer's state; where layers share a budget, as all have together.

        Args:
            dtype: of keys and values, unless `memory_dtype` says in which format a text's memory is counted: weights
                that are widened for training must not change how many tokens a window holds.
        """
        dtype = self.memory_dtype or dtype
        if dtype not in self._window:
            self._window[dtype] = equal_window(self.mixer, dtype, self.window_tokens.get(dtype))
        share_map(self._window[dtype], self.mixer)
        return self._window[dtype]

    def _acting(self, call: Call) -> tuple[Mixer, str]:
        """What computes the present mode, and in which of its own."""
        if self.mode != EQUAL_WINDOW:
            return self.mixer, self.mode
        return self.window(call.k.dtype), FULL

    def softmax(self, call: AttentionCall) -> Tensor:
        """What the teacher computes: exact attention, O(N) memory."""
        facts = TokenFacts(call.padding, call.segments)
        mask = softmax_mask(facts, call.mask, call.q.shape[2], call.k.shape[2], call.seen, call.q.device)
        if call.softcap is not None or call.sink_logits is not None:
            return capped_softmax(call.q, call.k, call.v, mask, call.scale, call.softcap, call.sink_logits)
        causal = mask is None and call.q.shape[2] > 1
        grouped = call.q.shape[1] != call.k.shape[1]
        return nnf.scaled_dot_product_attention(
            call.q, call.k, call.v, attn_mask=mask, is_causal=causal, scale=call.scale, enable_gqa=grouped
        )


def mixer_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    linearized: Handover | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: hands the call to the `LinearizedAttention` that started it."""
    if linearized is None:
        raise LolcatsError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention function, so it cannot be "
            "linearized; leave this layer out with `layers`"
        )
    refuse_unknown(module, others)
    layer, past = linearized.layer, linearized.past
    layer.check_sizes(query, key)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mask, (batch, _, tokens, _) = plain_tensor(attention_mask), query.shape
    if layer.mode == SOFTMAX and layer.observer is None and mask is not None and mask.ndim == 4:
        facts = TokenFacts(None, None)  # softmax attention can do what such a mask says, whatever it is
    else:
        facts = read_facts(mask, batch, tokens, past, read_texts(others, mask, batch, tokens, past, linearized.backend))
    end = past.seen + tokens if isinstance(past.seen, int) else None
    call = AttentionCall(
        query, key, value, linearized.hidden, scale, *facts, softcap, s_aux, linearized.rotation, linearized.reach, end,
        mask, past.seen,
    )  # fmt: skip
    out = layer.dispatch(call, linearized)
    if layer.listener is not None:
        layer.listener(layer, out)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, mixer_interface)


def linearized_layers(model: nn.Module) -> list[LinearizedAttention]:
    """The linearized attention layers of a model (peft wrappers are looked through), in order."""
    return [m for m in model.modules() if isinstance(m, LinearizedAttention)]


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a linearization added to a model, by their names in it."""
    return {
        f"{name}.mixer.{key}": p
        for name, module in model.named_modules()
        if isinstance(module, LinearizedAttention)
        for key, p in module.mixer.named_parameters()
    }


def measured_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a linearization measured on text and nothing trains, by the names in the model."""
    return {
        f"{name}.mixer.{key}": buffer
        for name, module in model.named_modules()
        if isinstance(module, LinearizedAttention)
        for key, buffer in module.mixer.named_buffers()
    }


@contextmanager
def attention_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Inside, every linearized layer computes `mode`.

    Args:
        model: a linearized model.
        mode: "softmax" is the teacher, "full" (or "hybrid") the layer itself, "equal_window" a plain window that takes
            the bytes of its state; the others are controls, which the mixer of the layers names (`Mixer.modes`).

    Raises:
        LolcatsError: a layer has no such mode.
    """
    layers, mode = linearized_layers(model), ALIASES.get(mode, mode)
    for layer in layers:
        if mode not in (known := dict.fromkeys((*COMMON_MODES, *layer.mixer.modes))):
            raise LolcatsError(f"expected a mode of {', '.join(known)}; got {mode!r}")
    before = [layer.mode for layer in layers]
    try:
        for layer in layers:
            layer.mode = mode
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.mode = old
