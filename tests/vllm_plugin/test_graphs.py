"""What a recorded decoding step reads: where it lies, and what stands in rows without a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig  # pyright: ignore[reportMissingImports]
from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
from vllm.v1.attention.backend import (  # pyright: ignore[reportMissingImports]
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import MambaSpec  # pyright: ignore[reportMissingImports]

from lolcats.serving.vllm_plugin.metadata import StateMetadataBuilder
from lolcats.serving.vllm_plugin.pages import StatePages
from lolcats.serving.vllm_plugin.plan import make_mixer, make_plan
from vllm_plugin.test_offline import RECOMMENDED

pytestmark = pytest.mark.slow
NAME = "model.layers.0.self_attn.attn.states"
PAGES, ROWS = 9, 4


@pytest.fixture(scope="module")
def settings(linearized: Callable[..., Path]) -> VllmConfig:
    """Of an engine on a GPU that is asked for recorded decoding steps; on a CPU vLLM takes that back."""
    folder = linearized(**RECOMMENDED)
    options = EngineArgs(model=str(folder), dtype="float32", max_model_len=64, max_num_seqs=ROWS, enforce_eager=True)
    config = options.create_engine_config()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    return config


@pytest.fixture
def pages(settings: VllmConfig) -> StatePages:
    """Filled with what earlier requests left."""
    plan = make_plan(settings)
    mixers = [make_mixer(plan.config, plan.whole, place, plan.shard) for place in range(len(plan.layers))]
    pages = StatePages(NAME, mixers, torch.float32, plan.pages[0])
    pages.kv_cache = (torch.full((PAGES, plan.page_bytes), 7, dtype=torch.uint8),)
    settings.compilation_config.static_forward_context[NAME] = pages
    return pages


@pytest.fixture
def builder(settings: VllmConfig, pages: StatePages) -> StateMetadataBuilder:
    spec = MambaSpec(block_size=64, shapes=pages.get_state_shape(), dtypes=pages.get_state_dtype())
    return StateMetadataBuilder(spec, [NAME], settings, torch.device("cpu"))


def step(table: list[int], ends: list[int], counts: list[int], prefilling: list[bool]) -> CommonAttentionMetadata:
    """What vLLM tells of a step: of each row its page, the length of its text after it, and its tokens."""
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    lengths, total = torch.tensor(ends).int(), sum(counts)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(counts), num_actual_tokens=total, max_query_len=max(counts), max_seq_len=max(ends),
        block_table_tensor=torch.tensor(table).int()[:, None], slot_mapping=torch.zeros(total, dtype=torch.int64),
        is_prefilling=torch.tensor(prefilling),
    )  # fmt: skip


def cleared(pages: StatePages) -> list[int]:
    (raw,) = pages.kv_cache
    return [page for page in range(PAGES) if not bool((raw[page] == 7).all())]


def test_a_graph_finds_the_slots_of_each_step(builder: StateMetadataBuilder, pages: StatePages) -> None:
    """Recorded with all rows; then with fewer, among them a prompt of one token."""
    recorded = builder.build_for_cudagraph_capture(step([0] * ROWS, [1] * ROWS, [1] * ROWS, [False] * ROWS))
    slots = recorded.decode_slots
    assert slots is not None and slots.tolist() == [-1] * ROWS
    meta = builder.build(0, step([5, 2, 7, 0], [9, 4, 1, 0], [1, 1, 1, 0], [False, False, True, False]))
    assert slots.tolist() == [5, 2, 7, -1], "what the graph reads"
    assert meta.decode_slots is not None and meta.decode_slots.tolist() == [5, 2, 7]
    assert not meta.prompts and meta.num_prefills == 0
    assert cleared(pages) == [0, 7]  # no request has page 0
    builder.build(0, step([3, 0, 0, 0], [5, 0, 0, 0], [1, 0, 0, 0], [False] * ROWS))
    assert slots.tolist() == [3, -1, -1, -1]


def test_steps_with_prompts_are_not_recorded(builder: StateMetadataBuilder, pages: StatePages) -> None:
    meta = builder.build(0, step([5, 2, 7], [9, 6, 3], [1, 4, 3], [False, True, True]))
    assert meta.decode_slots is not None and meta.decode_slots.tolist() == [5]
    assert [meta.prompt_slots(rows).tolist() for rows in meta.prompts] == [[2, 7]]
    assert cleared(pages) == [7]


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_only_who_asks_for_it_gets_it(mode: CUDAGraphMode, settings: VllmConfig) -> None:
    before, settings.compilation_config.cudagraph_mode = settings.compilation_config.cudagraph_mode, mode
    support = StateMetadataBuilder.get_cudagraph_support(settings, None)
    settings.compilation_config.cudagraph_mode = before
    asked = mode == CUDAGraphMode.FULL_DECODE_ONLY
    assert support == (AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if asked else AttentionCGSupport.NEVER)
