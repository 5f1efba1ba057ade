"""Recurrences for the far half of `blend`, whose state is no mean of values: it takes from keys to values.

| name        | decay                        | writes                              | source                            |
|-------------|------------------------------|-------------------------------------|-----------------------------------|
| simple_gla  | a number a head and token    | k v                                 | RetNet and GLA, arXiv 2312.06635  |
| mamba2      | exp(-A dt), a head and token | dt k v                              | Mamba-2, arXiv 2405.21060         |
| gla         | a number a channel and token | k v                                 | GLA, arXiv 2312.06635             |
| hgrn2       | a number a channel and token | (1 - decay) v, without keys         | HGRN2, arXiv 2404.07904           |
| delta       | none                         | beta k (v - what k recalls)         | DeltaNet, arXiv 2406.06484        |
| gated_delta | a number a head and token    | beta k (v - what k recalls)         | Gated DeltaNet, arXiv 2412.06464  |
| kda         | a number a channel and token | beta k (v - what k recalls)         | Kimi Linear, arXiv 2510.26692     |

Queries and keys are projected by a matrix a head, which starts as the identity, and have norm 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from lolcats.mixers.base import Sizes
from lolcats.mixers.decay import Decay
from lolcats.mixers.far import FarHalf, HalvedState, LinearFar
from lolcats.ops import RecurrenceOutput, RecurrentState, recurrence
from lolcats.ops.devices import without_autocast
from lolcats.ops.maps import project

BY_HEAD = ("simple_gla", "mamba2", "gated_delta")
BY_CHANNEL = ("gla", "hgrn2", "kda")
CORRECTING = ("delta", "gated_delta", "kda")
RECURRENCES = ("simple_gla", "mamba2", "gla", "hgrn2", "delta", "gated_delta", "kda")


class RecurrentFar(FarHalf):
    """See the module.

    Args:
        sizes: of what arrives.
        kind: one of `RECURRENCES`.
        feature_size: F, rows of the state; None is the head size.
        state_heads: "query" for one state a query head, "kv" for one a key head.
        reads: whether decays depend on the layer's input; else they are fixed numbers.
        impl: of the layer; "reference" is the literal recurrence.
    """

    def __init__(
        self, sizes: Sizes, kind: str, feature_size: int | None, state_heads: str, reads: bool, impl: str
    ) -> None:
        super().__init__()
        self.sizes, self.kind, self.impl = sizes, kind, "reference" if impl == "reference" else "auto"
        self.features = sizes.head_dim if feature_size is None else feature_size
        self.states = sizes.heads if state_heads == "query" else sizes.kv_heads
        self.query = nn.Parameter(self._identity(sizes.heads))
        # hgrn2 has no keys: what a token does not forget is what it writes.
        self.key = None if kind == "hgrn2" else nn.Parameter(self._identity(self.states))
        numbers = self.states * (self.features if kind in BY_CHANNEL else 1)
        self.decay = None if kind == "delta" else Decay(numbers, sizes.hidden_size, reads)
        self.beta = nn.Linear(sizes.hidden_size, self.states, dtype=torch.float32) if kind in CORRECTING else None
        if self.beta is not None:
            nn.init.zeros_(self.beta.weight)
            nn.init.zeros_(self.beta.bias)
        self.log_scale = nn.Parameter(torch.zeros(sizes.heads, dtype=torch.float32))

    def _identity(self, heads: int) -> Tensor:
        column = torch.arange(self.features) % self.sizes.head_dim
        return nnf.one_hot(column, self.sizes.head_dim).T.float().expand(heads, -1, -1).clone()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor,
        real: Tensor | None,
        state: RecurrentState | None,
        keep: bool,
    ) -> tuple[Tensor, RecurrentState | None]:
        """See `FarHalf.forward`."""
        result = self._run(self._directions(q, self.query), k, v, hidden, real, state, keep)
        scale = self.log_scale.exp()[:, None, None]
        return (result.out.to(scale.dtype) * scale).to(v.dtype), result.state

    def recall(self, k: Tensor, v: Tensor, hidden: Tensor, real: Tensor | None, state: RecurrentState | None) -> Tensor:
        """See `FarHalf.recall`."""
        groups = self.sizes.heads // self.sizes.kv_heads
        wanted = v.to(hidden.dtype).repeat_interleave(groups, 1)
        keys = self._keys(k, self._log_decay(hidden))
        as_queries = keys.repeat_interleave(self.sizes.heads // self.states, 1)
        out = self._run(as_queries, k, v, hidden, real, state, False).out
        error = (out.to(wanted.dtype) - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6)
        return error.unflatten(1, (self.sizes.kv_heads, groups)).mean(2)

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> RecurrentState:
        """See `FarHalf.empty_state`."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        kv = torch.zeros(rows, self.states, self.features, self.sizes.value_dim, dtype=dtype, device=device)
        return RecurrentState(kv, None, torch.zeros(rows, dtype=torch.int64, device=device))

    def decays(self, hidden: Tensor) -> Tensor | None:
        """See `FarHalf.decays`."""
        if (log_decay := self._log_decay(hidden)) is None:
            return None
        decay = log_decay.exp()
        decay = decay.mean(-1) if self.kind in BY_CHANNEL else decay
        return decay.repeat_interleave(self.sizes.heads // self.states, 1)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor,
        real: Tensor | None,
        state: RecurrentState | None,
        keep: bool,
    ) -> RecurrenceOutput:
        log_decay = self._log_decay(hidden)
        keys, beta = self._keys(k, log_decay), None
        if self.beta is not None:
            with without_autocast(hidden.device.type):
                beta = self.beta(hidden.to(self.beta.weight.dtype)).sigmoid().transpose(1, 2)
        return recurrence(
            q, keys, v, log_decay=log_decay, beta=beta, attention_mask=real, initial_state=state, return_state=keep,
            impl=self.impl,
        )  # fmt: skip

    def _log_decay(self, hidden: Tensor) -> Tensor | None:
        """[B, S, N], or [B, S, N, F] by channel."""
        if self.decay is None:
            return None
        found = self.decay(hidden)
        return found.unflatten(1, (self.states, -1)).transpose(2, 3) if self.kind in BY_CHANNEL else found

    def _keys(self, k: Tensor, log_decay: Tensor | None) -> Tensor:
        """What is written at each token, [B, S, N, F]."""
        if self.key is None:
            assert log_decay is not None
            return 1 - log_decay.exp()
        keys = self._directions(k, self.key)
        if self.kind == "mamba2":
            assert log_decay is not None
            keys = keys * -log_decay[..., None]
        return keys

    def _directions(self, x: Tensor, weight: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return nnf.normalize(project(x if x.dtype == torch.float64 else x.float(), weight), dim=-1)


def build_far(
    sizes: Sizes,
    impl: str,
    *,
    far: str,
    feature_map: str,
    feature_size: int | None,
    state_heads: str,
    decay: str,
    state_dtype: str,
) -> FarHalf | None:
    """The far half of these settings of `blend`, None for none."""
    if far == "none":
        return None
    if far == "linear":
        half: FarHalf = LinearFar(sizes, feature_map, feature_size, state_heads, decay, impl)
    else:
        half = RecurrentFar(sizes, far, feature_size, state_heads, decay == "gate", impl)
    return HalvedState(half) if state_dtype == "bfloat16" else half
