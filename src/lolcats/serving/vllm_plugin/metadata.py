"""Which page holds whose state, and which tokens are whose: made once a step for all layers."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder

from lolcats.serving.vllm_plugin.batch import Rows, group_rows
from lolcats.serving.vllm_plugin.pages import StatePages

NO_PAGE = 0
"""Page of rows that stand for nobody; vLLM gives it to no request."""


class StateBackend(AttentionBackend):
    """What vLLM finds by `StatePages.mamba_type`."""

    @staticmethod
    def get_name() -> str:
        """Its name in logs."""
        return "LOLCATS"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """What makes its metadata."""
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """It keeps states, not keys."""
        return True


@dataclass
class StateMetadata(BaseMambaAttentionMetadata):
    """Requests that decode come first, one token each, then prompts or pieces of prompts."""

    prompts: tuple[Rows, ...] = ()
    """Their tokens are counted from the first of the step."""

    @property
    def decode_slots(self) -> Tensor:
        """[num_decodes] int64, pages of the requests that decode; -1 for a row without a request."""
        assert self.state_indices_tensor_d is not None
        slots = self.state_indices_tensor_d[: self.num_decode_tokens, 0].long()
        return slots.masked_fill(slots == NO_PAGE, -1)

    def prompt_slots(self, rows: Rows) -> Tensor:
        """[B] int64, pages of the prompts in these rows."""
        assert self.state_indices_tensor_p is not None
        return self.state_indices_tensor_p.long().index_select(0, rows.numbers)


class StateMetadataBuilder(BaseMambaAttentionMetadataBuilder[StateMetadata]):
    """Makes `StateMetadata`, and clears the pages of requests that begin."""

    metadata_cls = StateMetadata
    needs_causal_conv1d_metadata = False
    supports_update_block_table = False  # pages are cleared in `build`, which each group of layers has to come through
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
    ) -> StateMetadata:
        """See the base."""
        meta = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        ends, starts = common_attn_metadata.seq_lens_cpu_upper_bound, common_attn_metadata.query_start_loc_cpu
        assert ends is not None
        starts = starts[: meta.num_decodes + meta.num_prefills + 1]
        self._clear(meta, ends[: len(starts) - 1] == starts.diff())
        if meta.num_prefills:
            device = common_attn_metadata.query_start_loc.device
            meta.prompts = tuple(group_rows(starts[meta.num_decodes :].tolist(), device))
        return meta

    def _clear(self, meta: StateMetadata, begins: Tensor) -> None:
        """Empty the pages of those requests of a step of which all tokens so far are in it: `begins` [B]."""
        new = begins.nonzero()[:, 0]
        if not len(new):
            return
        parts = (meta.state_indices_tensor_d, meta.num_decodes), (meta.state_indices_tensor_p, meta.num_prefills)
        slots = torch.cat([x.flatten()[:count] for x, count in parts if x is not None]).long()
        slots = slots.index_select(0, new.to(slots.device, non_blocking=True))
        context = self.vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            pages = context[name]
            assert isinstance(pages, StatePages)
            pages.clear(slots)
