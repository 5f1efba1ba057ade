"""`LinearizedAttention`: takes the place of vLLM's `Attention` inside a family's attention module.

The family calls it with the tokens of all requests of a step in one row, [T, heads * size]. Any mixer does the work, on
states that lie in vLLM's pages.

Legend: T tokens of a step, B requests, N tokens of a row, H query heads, KV key heads, D key size, Dv value size.
"""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from lolcats.mixers import Call, Mixer, Reach
from lolcats.mixers.state import put_rows
from lolcats.ops.types import map_state
from lolcats.serving.vllm_plugin.metadata import StateMetadata
from lolcats.serving.vllm_plugin.pages import StatePages
from lolcats.serving.vllm_plugin.rotary import rotation_at

OPERATION = "lolcats::linearized_attention"
"""Where vLLM splits compiled graphs."""


class Inputs:
    """What the attention module that is at work was called with, beyond q, k and v; one object for a model."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        """[T, d_model]."""
        self.positions: Tensor | None = None
        """[T], of which its rotary module was told; None where it rotates nothing."""
        self.watched: list[nn.Module] = []
        """Rotary modules that tell."""


class Facts(NamedTuple):
    """What the family does around its attention."""

    scale: float
    """Of scores."""
    softcap: float | None
    """Of scores."""
    rotary: nn.Module | None
    """Its rotary module, for mixers that need to know."""
    reach: Reach | None
    """The context of the model, where texts may be longer."""


class LinearizedAttention(nn.Module):
    """A mixer for the requests of a step.

    Args:
        name: of the layer that it replaces, which vLLM looks it up by.
        mixer: with its parameters.
        facts: of the family.
        inputs: where hooks leave what the attention module is called with.
    """

    def __init__(self, name: str, mixer: Mixer, facts: Facts, inputs: Inputs) -> None:
        super().__init__()
        self.layer_name, self.mixer, self.inputs = name, mixer, inputs
        self.facts = facts  # its rotary module is the family's, not one of ours
        self.pages: StatePages | None = None
        self.number = 0

    def keep_in(self, pages: StatePages, number: int) -> None:
        """Say where its states are: those of the layer of this number in these pages."""
        self.pages, self.number = pages, number

    def forward(self, query: Tensor, key: Tensor, value: Tensor, output_shape: torch.Size | None = None) -> Tensor:
        """Attention of query [T, H * D], key [T, KV * D] and value [T, KV * Dv]: [T, H * Dv]."""
        hidden, positions = self.inputs.hidden, self.inputs.positions
        assert hidden is not None
        sizes = self.mixer.sizes
        out = query.new_empty(query.shape[0], sizes.heads * sizes.value_dim)
        torch.ops.lolcats.linearized_attention(query, key, value, hidden, positions, out, self.layer_name)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, positions: Tensor | None, out: Tensor) -> None:
        """A step of all requests, written to `out`; what is beyond their tokens stays as it is."""
        sizes = self.mixer.sizes
        q, k = (x.view(x.shape[0], -1, sizes.head_dim) for x in (q, k))
        step = Step(self, q, k, v.view(v.shape[0], -1, sizes.value_dim), hidden, positions)
        out = out.view(out.shape[0], sizes.heads, sizes.value_dim)
        every: Any = get_forward_context().attn_metadata
        if every is None:  # vLLM measures memory by a step without requests
            whole = torch.arange(len(q), device=q.device)[None]
            out.copy_(self.mixer(step.call(whole, None), keep=True)[0][0].transpose(0, 1))
            return
        assert self.pages is not None
        meta: StateMetadata = every[self.pages.layer_name]
        pool = self.pages.pool(self.number)
        if meta.decode_slots is not None:
            count = len(meta.decode_slots)
            tokens = torch.arange(count, device=q.device)[:, None]
            y, _ = self.mixer.step(step.call(tokens, None), pool, slots=meta.decode_slots)
            out[:count] = y[:, :, 0]
        for rows in meta.prompts:
            slots = meta.prompt_slots(rows)
            state = map_state(pool, lambda t, slots=slots: t.index_select(0, slots))
            y, new = self.mixer(step.call(rows.token, rows.padding), state, keep=True)
            put_rows(pool, new, slots)
            out.index_copy_(0, rows.places, y.transpose(1, 2).flatten(0, 1).index_select(0, rows.real).to(out.dtype))


class Step:
    """The tokens of a step, of which rows are taken."""

    def __init__(
        self, layer: LinearizedAttention, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, positions: Tensor | None
    ) -> None:
        self.layer, self.q, self.k, self.v = layer, q, k, v
        self.hidden, self.positions = hidden, positions

    def call(self, token: Tensor, padding: Tensor | None) -> Call:
        """What the mixer is given for the tokens at `token` [B, N]."""
        q, k, v = (x[token].transpose(1, 2) for x in (self.q, self.k, self.v))
        facts, hidden, rotation, reach = self.layer.facts, self.hidden[token], None, None
        if self.layer.mixer.needs_rotation:
            positions = None if self.positions is None else self.positions[token]
            rotation = rotation_at(facts.rotary, positions, hidden)
            reach = None if positions is None else facts.reach
        return Call(
            q, k, v, hidden, facts.scale, padding, softcap=facts.softcap, rotation=rotation, reach=reach
        )  # fmt: skip


def _linearized_attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, positions: Tensor | None, out: Tensor, layer_name: str
) -> None:
    get_forward_context().no_compile_layers[layer_name].attend(q, k, v, hidden, positions, out)


def _nothing(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, positions: Tensor | None, out: Tensor, layer_name: str
) -> None:
    return


_LIBRARY = torch.library.Library("lolcats", "FRAGMENT")
if not hasattr(torch.ops.lolcats, "linearized_attention"):
    direct_register_custom_op(
        op_name="linearized_attention", op_func=_linearized_attention, mutates_args=["out"], fake_impl=_nothing,
        target_lib=_LIBRARY,
    )  # fmt: skip
