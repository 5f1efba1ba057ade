"""What looking into one layer takes in memory: far less than two gigabytes for 4,096 tokens."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from inside_cases import passes
from lolcats.evaluation.analysis.attention import Pooling, attention_maps
from lolcats.evaluation.analysis.layers import BLOCK_BYTES, LayerMeter, block_of

TOKENS, MOST, TENSORS = 4096, 2e9, 24
STATUS = Path("/proc/self/status")


def kilobytes(name: str) -> int:
    """A number of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux tells it")
def test_peak(make_teacher: Callable[..., PreTrainedModel], make_student: Callable[..., PreTrainedModel],
              tokens: Callable[..., Tensor]) -> None:  # fmt: skip
    """It is some tensors of a block, whose bytes have a bound, so that a layer of many heads takes no more."""
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 1}
    settings = {"mixer": "blend", "window": 64, "sinks": 4, "kept": {"pairs": 32, "score": "recency"}, "far": "none"}
    model = make_student(make_teacher(**sizes, max_position_embeddings=TOKENS), **settings)
    ids = tokens(1, TOKENS)[0]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier tests have freed is taken first, which is no growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    with torch.no_grad():
        seen = passes(model, ids)[0]
        meter = LayerMeter()
        meter.add(seen)
        attention_maps(seen, Pooling.of(TOKENS, 96))
    peak = 1024 * (kilobytes("VmHWM") - before)
    block = 4 * 3 * block_of(seen.call) * TOKENS
    assert block < peak < TENSORS * block and TENSORS * BLOCK_BYTES < MOST, peak
