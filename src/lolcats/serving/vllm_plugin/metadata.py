"""Which page holds whose state, and which tokens are whose: made once a step for all layers."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
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

    decode_slots: Tensor | None = None
    """[rows] int64, pages of the requests that decode, -1 for a row without a request; None where none do."""

    def prompt_slots(self, rows: Rows) -> Tensor:
        """[B] int64, pages of the prompts in these rows."""
        assert self.state_indices_tensor_p is not None
        return self.state_indices_tensor_p.long().index_select(0, rows.numbers)


class StateMetadataBuilder(BaseMambaAttentionMetadataBuilder[StateMetadata]):
    """Makes `StateMetadata`, and clears the pages of requests that begin."""

    metadata_cls = StateMetadata
    needs_causal_conv1d_metadata = False
    supports_update_block_table = False  # pages are cleared in `build`, which each group of layers has to come through

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Graphs read what was there when they were recorded, so its memory stays.
        self.decode_slots = torch.full_like(self.state_indices_tensor_d[:, 0], -1, dtype=torch.int64)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole decoding steps are recorded where that is asked for by name; else what lies between the layers."""
        if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
    ) -> StateMetadata:
        """See the base. Rows that fill up a graph have no tokens, and the page that is nobody's."""
        common, prefilling = common_attn_metadata, common_attn_metadata.is_prefilling
        if common.max_query_len == 1 and prefilling is not None:
            # Such a step runs as a recorded one, whatever its tokens are of: prompts of one token decode from a page
            # that was cleared.
            common = common.replace(is_prefilling=torch.zeros_like(prefilling))
        meta = super().build(common_prefix_len, common, *args, **kwargs)
        ends, starts = common.seq_lens_cpu_upper_bound, common.query_start_loc_cpu
        assert ends is not None
        starts = starts[: meta.num_decodes + meta.num_prefills + 1]
        counts = starts.diff()
        self._clear(meta, (ends[: len(counts)] == counts) & (counts > 0))
        if meta.num_decode_tokens:
            meta.decode_slots = self._keep_slots(meta)
        if meta.num_prefills:
            device = common.query_start_loc.device
            meta.prompts = tuple(group_rows(starts[meta.num_decodes :].tolist(), device))
        return meta

    def _keep_slots(self, meta: StateMetadata) -> Tensor:
        """`decode_slots` of a step, where graphs look for them."""
        assert meta.state_indices_tensor_d is not None
        pages = meta.state_indices_tensor_d[:, 0].long()
        slots = pages.masked_fill(pages == NO_PAGE, -1)
        if len(slots) <= len(self.decode_slots):
            slots = self.decode_slots[: len(slots)].copy_(slots)
        return slots[: meta.num_decode_tokens]

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
