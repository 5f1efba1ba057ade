"""`LinearizedAttention`: a family's own attention module whose attention itself is replaced.

The family computes q, k, v (norms, biases, RoPE) and the output projection as ever. In transformers 5 it calls the
attention function named by its config in between; the wrapper gives it a config that names `hybrid_interface` and
passes itself along as a keyword, so nothing of any family is copied here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache

from lolcats.errors import LolcatsError
from lolcats.feature_maps import FeatureMap, map_weights
from lolcats.modeling.cache import LinearizedLayer, linearized_layer, past_of, to_device
from lolcats.modeling.calls import refuse_unknown
from lolcats.modeling.facts import read_facts, read_texts
from lolcats.modeling.handover import AttentionCall, Handover
from lolcats.modeling.masks import NAME, TokenFacts, plain_tensor, softmax_mask
from lolcats.modeling.passes import check_first_visit
from lolcats.modeling.softmax import capped_softmax
from lolcats.ops import HybridOutput, HybridSpec, HybridState, hybrid_attention, hybrid_step, leaving_keys

Mode = Literal["hybrid", "softmax", "window_only", "linear_only", "no_attention"]
"""What a linearized layer computes: itself, its teacher, or one of the controls that show what each half does."""


Observer = Callable[["LinearizedAttention", AttentionCall, Tensor], None]
"""Called with the layer, the call and the softmax output [B, H, N, Dv]; see `training.transfer`."""


class LinearizedAttention(nn.Module):
    """Hybrid attention around a family's attention module.

    Args:
        inner: the family's module; its weights are never changed here.
        feature_q, feature_k: feature maps of the queries (one per query head) and keys (one per query or key head).
        heads: H, number of query heads.
        settings: window, its kind and sinks (the scale comes from the family).
        impl: implementation of `hybrid_attention` for more than one token.
        decay_gate: maps the layer's input [B, N, d_model] to the logits [B, N, H] of the decay, or None.
    """

    def __init__(
        self,
        inner: nn.Module,
        feature_q: FeatureMap,
        feature_k: FeatureMap,
        heads: int,
        settings: HybridSpec,
        impl: str,
        decay_gate: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.feature_q, self.feature_k = feature_q, feature_k
        self.window_factor = nn.Parameter(torch.full((heads,), PAPER_WINDOW_FACTOR, dtype=torch.float32))
        self.query_scale = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.decay_gate = decay_gate
        self.settings = settings
        self.impl = self.eager_impl = impl
        self.mode: Mode = "hybrid"
        self.observer: Observer | None = None
        self.model_config: PretrainedConfig | None = None

    @property
    def layer_idx(self) -> int:
        """Index of the layer in the model."""
        return int(self.inner.layer_idx)  # type: ignore[arg-type]

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the linearization added, by name."""
        return {n: p for n, p in self.named_parameters() if not n.startswith("inner.")}

    def check_sizes(self, q: Tensor, k: Tensor) -> None:
        """Raise LolcatsError where q [B, H, N, D] or k [B, KV, N, D] are not what the feature maps were made for."""
        expected = (self.feature_q.heads, self.feature_q.head_dim)
        got = (q.shape[1], q.shape[3])
        if got != expected or self.feature_k.heads % k.shape[1] or k.shape[3] != expected[1]:
            raise LolcatsError(
                f"expected {expected[0]} query heads of size {expected[1]}; {type(self.inner).__name__} gives "
                f"queries {tuple(q.shape)} and keys {tuple(k.shape)}; leave this layer out with `layers`"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's forward; its cache is kept from it, because the hybrid keeps a state of its own."""
        name = next((n for n in CACHE_ARGUMENTS if n in kwargs), CACHE_ARGUMENTS[0])
        cache: Cache | None = kwargs.pop(name, None)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        backend = getattr(self.model_config, "_attn_implementation", None) or NAME
        past = past_of(cache, self.layer_idx, hidden.shape[1])
        handover = Handover(self, hidden, cache, past, kwargs.get("position_embeddings"), backend)
        if self.mode == "softmax" and self.observer is None:
            handover.cache = None
            return self.inner(*args, **{name: cache}, linearized=handover, **kwargs)
        return self.inner(*args, **{name: None}, linearized=handover, **kwargs)

    def dispatch(self, call: AttentionCall, handover: Handover) -> Tensor:
        """Output [B, H, N, Dv] of the layer in its present mode."""
        cache = handover.cache
        if self.observer is not None:
            teacher = self.softmax(call)
            self.observer(self, call, teacher)
            return teacher
        if self.mode == "softmax":
            return self.softmax(call)
        if cache is None:
            return self.hybrid(call)
        layer = linearized_layer(cache, self.layer_idx)
        check_first_visit(handover.rotary, layer, self.layer_idx)
        if layer.state is not None:
            layer.state = to_device(layer.state, call.q.device)
        if call.q.shape[2] == 1 and layer.state is not None:
            return self._step(call, layer)
        return self._prefill(call, layer)

    def softmax(self, call: AttentionCall) -> Tensor:
        """What the teacher computes: exact attention, O(N) memory."""
        mask = softmax_mask(call.facts, call.mask, call.q.shape[2], call.k.shape[2], call.seen, call.q.device)
        if call.softcap is not None or call.sink_logits is not None:
            return capped_softmax(call.q, call.k, call.v, mask, call.scale, call.softcap, call.sink_logits)
        causal = mask is None and call.q.shape[2] > 1
        grouped = call.q.shape[1] != call.k.shape[1]
        return nnf.scaled_dot_product_attention(
            call.q, call.k, call.v, attn_mask=mask, is_causal=causal, scale=call.scale, enable_gqa=grouped
        )

    def features(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """phi_q [B, H, N, F], phi_k [B, H or KV, N, F], window factor [H], log decay [B, H, N] of the present mode."""
        phi_q, factor, log_decay = self._query_side(call)
        return phi_q, self.feature_k(call.k), factor, log_decay

    def _query_side(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """`features` without phi_k: decoding maps keys when they leave the window, not when they come."""
        phi_q = self.query_features(call.q)
        if self.mode == "window_only":
            phi_q = torch.zeros_like(phi_q)
        return phi_q, self._factor(), self.log_decay(call.hidden)

    def _factor(self) -> Tensor:
        return torch.full_like(self.window_factor, -torch.inf) if self.mode == "linear_only" else self.window_factor

    def query_features(self, q: Tensor) -> Tensor:
        """phi_q(q), scaled for each head: the scale sets the share of the linear half."""
        phi = self.feature_q(q)
        return phi * self.query_scale.to(phi.dtype).exp()[:, None, None]

    def log_decay(self, hidden: Tensor) -> Tensor | None:
        """Log of the decay of the linear half at each token: [B, H, N], or None without a gate."""
        if self.decay_gate is None:
            return None
        with torch.autocast(hidden.device.type, enabled=False):
            return nnf.logsigmoid(self.decay_gate(hidden.to(self.decay_gate.weight.dtype))).transpose(1, 2)

    def hybrid(self, call: AttentionCall) -> Tensor:
        """The hybrid over a whole text, no state kept: [B, H, N, Dv]; differentiable in everything."""
        if self.impl == "compiled":
            return _compiled_hybrid()(self, call)
        return self._hybrid(call)

    def linear_attention(self, call: AttentionCall) -> Tensor:
        """Linear attention alone, over all keys, as if there were no window: a target of attention transfer."""
        return self._attend(call, HybridSpec(window=0), segment_ids=call.facts.segments).out

    def _hybrid(self, call: AttentionCall) -> Tensor:
        out = self._attend(call, segment_ids=call.facts.segments, **self.options(call)).out
        return torch.zeros_like(out) if self.mode == "no_attention" else out

    def _attend(self, call: AttentionCall, spec: HybridSpec, **options: Any) -> HybridOutput:
        options.update(attention_mask=call.facts.padding, impl=self.plain_impl())
        maps = map_weights(self.feature_q, self.feature_k, self.query_scale)
        if maps is None or self.mode == "window_only":
            phi_q, phi_k, factor, log_decay = self.features(call)
            features = phi_q, phi_k
        else:
            features, factor, log_decay = maps, self._factor(), self.log_decay(call.hidden)
        return hybrid_attention(call.q, call.k, call.v, features, factor, spec, log_decay=log_decay, **options)

    def plain_impl(self) -> str:
        """The implementation of code that is not compiled here."""
        # Compilation is for training on equal shapes; prompts differ in length.
        return self.eager_impl if self.impl == "compiled" else self.impl

    def options(self, call: AttentionCall) -> dict[str, Any]:
        """What `hybrid_attention` is to do: the layer's settings, and what the family does with its scores."""
        return {
            "spec": self.settings._replace(scale=call.scale, softcap=call.softcap),
            "sink_logits": call.sink_logits,
        }

    def _prefill(self, call: AttentionCall, layer: LinearizedLayer) -> Tensor:
        state = layer.state
        if state is not None:
            state = state._replace(window=state.window._replace(phi_k=self._ring_features(state)))
        options, facts = self.options(call), call.facts
        if facts.segments is None:
            result = self._attend(call, initial_state=state, return_state=True, **options)
            out = result.out
        else:  # packed texts, in an empty cache: the state is that of the last one of each row
            assert state is None
            out = self._attend(call, segment_ids=facts.segments, **options).out
            last = facts.segments == facts.segments.amax(-1, keepdim=True)
            alone = replace(call, facts=TokenFacts(last & (facts.segments >= 0), None))
            result = self._attend(alone, return_state=True, **options)
        assert result.state is not None
        kept = result.state._replace(window=result.state.window._replace(phi_k=None))
        layer.advance(kept, call.q.shape[2], whole=facts.padding is None and facts.segments is None)
        return torch.zeros_like(out) if self.mode == "no_attention" else out

    def _ring_features(self, state: HybridState) -> Tensor:
        return self._per_state_head(self.feature_k(state.window.k))

    def _per_state_head(self, phi_k: Tensor) -> Tensor:
        if self.decay_gate is None:
            return phi_k
        return phi_k.repeat_interleave(self.window_factor.shape[0] // phi_k.shape[1], 1)

    def _step(self, call: AttentionCall, layer: LinearizedLayer) -> Tensor:
        state = layer.state
        assert state is not None
        options, padding = self.options(call), call.facts.padding
        features = map_weights(self.feature_q, self.feature_k, self.query_scale)
        if features is None or self.mode == "window_only":
            phi_q, factor, log_decay = self._query_side(call)
            features = phi_q, self.feature_k(leaving_keys(state, call.k, options["spec"]))
        else:
            factor, log_decay = self._factor(), self.log_decay(call.hidden)
        out, state = hybrid_step(
            call.q, call.k, call.v, features, factor, state, log_decay=log_decay,
            active=None if padding is None else padding[:, 0], donate=True, impl=self.plain_impl(), **options,
        )  # fmt: skip
        layer.advance(state, 1, whole=padding is None)
        return torch.zeros_like(out) if self.mode == "no_attention" else out


@functools.cache
def _compiled_hybrid() -> Callable[[LinearizedAttention, AttentionCall], Tensor]:
    """Feature maps and attention compiled together, once for all layers."""
    return torch.compile(LinearizedAttention._hybrid, dynamic=False)


CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""Names under which families hand the cache to their attention module."""
PAPER_WINDOW_FACTOR = -2.1972246
"""logit(0.1): the paper's initial window factor."""


def hybrid_interface(
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
    if layer.mode == "softmax" and layer.observer is None and mask is not None and mask.ndim == 4:
        facts = TokenFacts(None, None)  # softmax attention can do what such a mask says, whatever it is
    else:
        facts = read_facts(mask, batch, tokens, past, read_texts(others, mask, batch, tokens, past, linearized.backend))
    call = AttentionCall(query, key, value, linearized.hidden, mask, facts, scale, softcap, s_aux, past.seen)
    out = layer.dispatch(call, linearized)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, hybrid_interface)
