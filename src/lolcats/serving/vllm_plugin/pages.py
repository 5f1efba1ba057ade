"""`StatePages`: what vLLM takes for a layer with a state, and allocates a page for, for each request."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from lolcats.mixers import Mixer
from lolcats.serving.vllm_plugin.layout import PageLayout, empty_page, pool_in_pages


class StatePages(MambaBase):
    """The states of one or more layers; to vLLM each page is one tensor of bytes.

    Args:
        name: among vLLM's layers.
        mixers: of the layers.
        dtype: of the model.
        layout: of the page.
    """

    def __init__(self, name: str, mixers: Sequence[Mixer], dtype: torch.dtype, layout: PageLayout) -> None:
        self.layer_name = self.prefix = name
        self.layout = layout
        self.kv_cache: Any = ()  # vLLM puts [(pages, bytes)] here when it has measured what memory there is
        self._forms = [mixer.empty_state(1, dtype) for mixer in mixers]
        self._empty = empty_page(mixers, dtype, layout)
        self._pools: tuple[int, list[Any]] | None = None

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Names the backend, whose metadata say which page is whose."""
        return MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One tensor of bytes."""
        return ((self.layout.nbytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Bytes."""
        return (torch.uint8,)

    def pool(self, number: int) -> Any:
        """The states of all pages of the layer of this number; a view of them."""
        raw = self._raw()
        if self._pools is None or self._pools[0] != raw.data_ptr():
            pools = [pool_in_pages(raw, *part) for part in zip(self.layout.offsets, self._forms, strict=True)]
            self._pools = raw.data_ptr(), pools
        return self._pools[1][number]

    def clear(self, slots: Tensor) -> None:
        """Forget what the pages `slots` [B] held: requests begin in them, and vLLM hands out pages as they are."""
        if self.kv_cache:
            raw = self._raw()
            self._empty = self._empty.to(raw.device)
            raw.index_copy_(0, slots, self._empty.expand(len(slots), -1))

    def _raw(self) -> Tensor:
        (raw,) = self.kv_cache
        return raw
