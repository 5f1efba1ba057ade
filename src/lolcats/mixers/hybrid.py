"""`hybrid`: the layer of LoLCATs (arXiv 2410.10254), softmax over a window and linear attention over the rest.

Both halves share one denominator; `lolcats.ops.hybrid.reference` has the formula. All calls of that operation are here.

| mode         | what it is                                                                  |
|--------------|-----------------------------------------------------------------------------|
| full         | the layer                                                                   |
| window_only  | without its linear half: softmax over window and sinks                       |
| linear_only  | without its softmax half                                                     |
| no_attention | outputs of zero                                                              |
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from lolcats.mixers.base import Call, Mixer, Sizes
from lolcats.mixers.feature_maps import FeatureMap, build_feature_map, map_weights
from lolcats.mixers.inside import Inside, NearSize
from lolcats.mixers.start import MATCHED_WINDOW_FACTOR, Features, matched_scale
from lolcats.ops import (
    HybridOutput,
    HybridSpec,
    HybridState,
    hybrid_attention,
    hybrid_step,
    leaving_keys,
    resolve_impl,
)
from lolcats.ops.devices import without_autocast
from lolcats.ops.hybrid.layout import in_window
from lolcats.ops.types import map_state

PAPER_WINDOW_FACTOR = -2.1972246
"""logit(0.1): the paper's initial window factor."""
OPEN_GATE = 6.0
"""Initial bias of a decay gate: sigmoid(6) = 0.9975, half of a key's weight is left after 280 tokens."""


class HybridMixer(Mixer):
    """Hybrid attention.

    Args:
        sizes: of what arrives.
        impl: implementation of `hybrid_attention`.
        feature_q, feature_k: feature maps of the queries (one per query head) and keys (one per query or key head).
        settings: window, its kind and sinks (the scale comes with each call).
        decay_gate: maps the layer's input [B, N, d_model] to the logits [B, N, H] of the decay, or None.
    """

    modes = ("full", "window_only", "linear_only", "no_attention")
    targets = ("full", "far")

    def __init__(
        self,
        sizes: Sizes,
        impl: str,
        feature_q: FeatureMap,
        feature_k: FeatureMap,
        settings: HybridSpec,
        decay_gate: nn.Linear | None = None,
    ) -> None:
        super().__init__(sizes, impl)
        self.feature_q, self.feature_k = feature_q, feature_k
        self.window_factor = nn.Parameter(torch.full((sizes.heads,), PAPER_WINDOW_FACTOR, dtype=torch.float32))
        self.query_scale = nn.Parameter(torch.zeros(sizes.heads, dtype=torch.float32))
        self.decay_gate = decay_gate
        self.settings = settings

    @classmethod
    def build(  # type: ignore[override]  # the names of its settings are its own
        cls,
        sizes: Sizes,
        *,
        impl: str,
        feature_map: str,
        feature_size: int | None,
        window: int,
        window_kind: str,
        sinks: int,
        fold: int,
        state_heads: str,
        decay: str,
    ) -> HybridMixer:
        """The layer from the values of its settings, with the paper's start.

        Raises:
            ValueError: an unknown feature map or implementation, or a feature size below 1.
        """
        gate = None
        if decay == "gate":
            gate = nn.Linear(sizes.hidden_size, sizes.heads, dtype=torch.float32)
            nn.init.zeros_(gate.weight)
            nn.init.constant_(gate.bias, OPEN_GATE)
        key_maps = sizes.heads if state_heads == "query" else sizes.kv_heads
        maps = [
            build_feature_map(feature_map, count, sizes.head_dim, feature_size) for count in (sizes.heads, key_maps)
        ]
        settings = HybridSpec(window, window_kind, sinks, sizes.head_dim**-0.5, fold=fold)
        return cls(sizes, resolve_impl(impl), maps[0], maps[1], settings, gate)

    def forward(
        self, call: Call, state: HybridState | None = None, *, keep: bool = False, mode: str = "full"
    ) -> tuple[Tensor, HybridState | None]:
        """See `Mixer.forward`."""
        if keep and state is not None and call.q.shape[2] == 1 and call.segments is None:
            return self._step(call, state, mode)
        if keep or state is not None:
            return self._part(call, state, keep, mode)
        if self.impl == "compiled":
            return _compiled_whole()(self, call, mode), None
        return self._whole(call, mode), None

    def step(
        self, call: Call, state: HybridState, *, slots: Tensor | None = None, mode: str = "full"
    ) -> tuple[Tensor, HybridState | None]:
        """See `Mixer.step`; a slot of -1 is a row without a text, whose output is 0."""
        if slots is None:
            return super().step(call, state, mode=mode)
        return self._step(call, state, mode, slots)

    def _step(
        self, call: Call, state: HybridState, mode: str, slots: Tensor | None = None
    ) -> tuple[Tensor, HybridState]:
        """One more token; the kernel writes the new state over the old one."""
        options = self._options(call)
        features = map_weights(self.feature_q, self.feature_k, self.query_scale)
        if features is None or mode == "window_only":
            leaving = leaving_keys(state, call.k, options["spec"], slots)
            features = self._query_features(call.q, mode), self.feature_k(leaving)
        out, new = hybrid_step(
            call.q, call.k, call.v, features, self._factor(mode), state, log_decay=self.log_decay(call.hidden),
            active=None if call.padding is None else call.padding[:, 0], state_indices=slots, donate=True,
            impl=self.plain_impl, **options,
        )  # fmt: skip
        return _silenced(out, mode), new

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> HybridState:
        """See `Mixer.empty_state`; the operation itself makes it, from a token of padding."""
        s, gate = self.sizes, self.decay_gate is not None
        maps = self.feature_k.heads if self.feature_k.learned else s.kv_heads

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        q = zeros(s.heads, 1, s.head_dim, dtype=dtype)
        k, v = (zeros(s.kv_heads, 1, size, dtype=dtype) for size in (s.head_dim, s.value_dim))
        phi_q, phi_k = (zeros(heads, 1, self.feature_q.features) for heads in (s.heads, s.heads if gate else maps))
        state = hybrid_attention(
            q, k, v, (phi_q, phi_k), torch.zeros(s.heads, device=device), self.settings,
            log_decay=zeros(s.heads, 1) if gate else None, attention_mask=zeros(1), return_state=True, impl="chunked",
        ).state  # fmt: skip
        return map_state(_kept(state), Tensor.contiguous)

    def start(self, call: Call, teacher: Tensor) -> None:
        """The matched start, see `lolcats.mixers.start`."""
        features = Features(self.feature_q(call.q), self.feature_k(call.k), self.log_decay(call.hidden))
        scale = matched_scale(call, teacher, self.settings, features)
        with torch.no_grad():
            self.window_factor.fill_(MATCHED_WINDOW_FACTOR)
            if scale is not None:
                self.query_scale.copy_(scale)

    def target_output(self, call: Call, target: str) -> Tensor:
        """The layer's output, or for "far" linear attention over all keys, as if there were no window."""
        if target == "far":
            return self._attend(call, "full", HybridSpec(window=0), segment_ids=call.segments).out
        return super().target_output(call, target)

    def attention_weights(self, call: Call) -> Tensor:
        """See `Mixer.attention_weights`: what the layer gives for the identity matrix as values."""
        n = call.q.shape[2]
        return self.inside(call).near(torch.eye(n, device=call.q.device).expand(*call.k.shape[:2], n, n))

    def inside(self, call: Call) -> Inside:
        """See `Mixer.inside`.

        Sums are by the implementation of the layer, but for the kernels, whose values are short: in their place
        stands the chunked form.
        """
        features = self._query_features(call.q, "full"), self.feature_k(call.k)
        log_decay, options = self.log_decay(call.hidden), self._options(call)
        options["impl"] = "chunked" if self.plain_impl in ("auto", "triton") else self.plain_impl

        def near(values: Tensor) -> Tensor:
            return hybrid_attention(
                call.q, call.k, values, features, self.window_factor, log_decay=log_decay, segment_ids=call.segments,
                **options,
            ).out  # fmt: skip

        def sees(query: Tensor, key: Tensor) -> Tensor:
            return ((key < self.settings.sinks) | in_window(query, key, self.settings))[None]

        decay = None if log_decay is None else log_decay.exp()
        sizes = (NearSize(self.settings.window, self.settings.sinks, 0),) * self.sizes.kv_heads
        return Inside(sizes, near, None, None, decay, self.window_factor.sigmoid(), sees, None)

    @property
    def near_tokens(self) -> int:
        """See `Mixer.near_tokens`; a terraced window holds the block before that of the query too."""
        window, kind, sinks = self.settings[:3]
        return window * (sinks // window + 2) if kind == "terraced" else window + sinks

    @property
    def steps_a_write(self) -> int:
        """See `Mixer.steps_a_write`."""
        return self.settings.block

    def widened(self, tokens: int) -> HybridMixer:
        """The layer with a window over the whole text."""
        wide = copy.copy(self)
        wide.settings = self.settings._replace(window=tokens, window_kind="sliding")
        wide.impl = wide.eager_impl = "chunked"  # kernels answer to it in tests of their own, and have limits
        return wide

    def log_decay(self, hidden: Tensor) -> Tensor | None:
        """Log of the decay of the linear half at each token: [B, H, N], or None without a gate."""
        if self.decay_gate is None:
            return None
        with without_autocast(hidden.device.type):
            return nnf.logsigmoid(self.decay_gate(hidden.to(self.decay_gate.weight.dtype))).transpose(1, 2)

    def _query_features(self, q: Tensor, mode: str) -> Tensor:
        """phi_q(q), scaled for each head: the scale sets the share of the linear half."""
        phi = self.feature_q(q)
        phi = phi * self.query_scale.to(phi.dtype).exp()[:, None, None]
        return torch.zeros_like(phi) if mode == "window_only" else phi

    def _factor(self, mode: str) -> Tensor:
        return torch.full_like(self.window_factor, -torch.inf) if mode == "linear_only" else self.window_factor

    def _options(self, call: Call) -> dict[str, Any]:
        """What `hybrid_attention` is to do: the layer's settings, and what the family does with its scores."""
        return {
            "spec": self.settings._replace(scale=call.scale, softcap=call.softcap),
            "sink_logits": call.sink_logits,
        }

    def _attend(self, call: Call, mode: str, spec: HybridSpec, **options: Any) -> HybridOutput:
        options.update(attention_mask=call.padding, impl=self.plain_impl)
        features = map_weights(self.feature_q, self.feature_k, self.query_scale)
        if features is None or mode == "window_only":
            features = self._query_features(call.q, mode), self.feature_k(call.k)
        factor, log_decay = self._factor(mode), self.log_decay(call.hidden)
        return hybrid_attention(call.q, call.k, call.v, features, factor, spec, log_decay=log_decay, **options)

    def _whole(self, call: Call, mode: str) -> Tensor:
        if mode == "no_attention":
            return call.v.new_zeros(*call.q.shape[:3], call.v.shape[3])
        return _silenced(self._attend(call, mode, segment_ids=call.segments, **self._options(call)).out, mode)

    def _part(self, call: Call, state: HybridState | None, keep: bool, mode: str) -> tuple[Tensor, HybridState | None]:
        options = self._options(call)
        if call.segments is not None:  # the state is that of the last text of each row
            assert state is None, "packed texts start without a state"
            out = self._attend(call, mode, segment_ids=call.segments, **options).out
            last = call.segments == call.segments.amax(-1, keepdim=True)
            alone = replace(call, padding=last & (call.segments >= 0), segments=None)
            result = self._attend(alone, mode, return_state=True, **options)
        else:
            if state is not None:
                features = self._per_state_head(self.feature_k(state.window.k))
                state = state._replace(window=state.window._replace(phi_k=features))
            result = self._attend(call, mode, initial_state=state, return_state=keep, **options)
            out = result.out
        return _silenced(out, mode), _kept(result.state) if keep else None

    def _per_state_head(self, phi_k: Tensor) -> Tensor:
        if self.decay_gate is None:
            return phi_k
        return phi_k.repeat_interleave(self.sizes.heads // phi_k.shape[1], 1)


@functools.cache
def _compiled_whole() -> Callable[[HybridMixer, Call, str], Tensor]:
    """Feature maps and attention compiled together, once for all layers."""
    return torch.compile(HybridMixer._whole, dynamic=False)


def _kept(state: HybridState | None) -> HybridState:
    """The state without the features of the keys in the window, which are made anew from the keys."""
    assert state is not None
    return state._replace(window=state.window._replace(phi_k=None))


def _silenced(out: Tensor, mode: str) -> Tensor:
    return torch.zeros_like(out) if mode == "no_attention" else out
