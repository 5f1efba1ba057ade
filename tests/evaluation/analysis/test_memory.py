"""What looking into one layer takes in memory: far less than two gigabytes for 4,096 tokens."""

from __future__ import annotations

import gc
import re
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from forked import CONTEXT
from inside_cases import passes
from lolcats import LinearizationConfig, convert
from lolcats.evaluation.analysis.attention import Pooling, attention_maps
from lolcats.evaluation.analysis.layers import BLOCK_BYTES, LayerMeter, block_of
from shared import VOCABULARY, llama

TOKENS, MOST, TENSORS = 4096, 2e9, 24
STATUS = Path("/proc/self/status")


def kilobytes(name: str) -> int:
    """A number of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def measure(told: Connection) -> None:
    """Tell the bytes by which the peak grows, and those of one number for each pair of a query of a block and a key."""
    torch.set_num_threads(1)
    settings = {"mixer": "blend", "window": 64, "sinks": 4, "kept": {"pairs": 32, "score": "recency"}, "far": "none"}
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 1}
    model = convert(llama(**sizes, max_position_embeddings=TOKENS), LinearizationConfig(**settings), seed=0)
    ids = torch.randint(3, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    with torch.no_grad():
        seen = passes(model, ids)[0]
        meter = LayerMeter()
        meter.add(seen)
        attention_maps(seen, Pooling.of(TOKENS, 96))
    told.send((1024 * (kilobytes("VmHWM") - before), 4 * 3 * block_of(seen.call) * TOKENS))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux tells it")
def test_peak() -> None:
    """It is some tensors of a block, whose bytes have a bound, so that a layer of many heads takes no more.

    In a process of its own: what earlier tests have left in one would be counted, or taken first.
    """
    mine, its = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=measure, args=(its,), daemon=True)
    process.start()
    its.close()
    peak, block = mine.recv()
    process.join()
    assert block < peak < TENSORS * block and TENSORS * BLOCK_BYTES < MOST, peak
