"""A model whose heads are divided over two processes writes what `generate` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_plugin.equality import FEW, assert_same, by_generate, by_vllm
from vllm_plugin.test_offline import CODED, EXACT, RECOMMENDED, SPLIT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
KEPT = {"pairs": 8, "score": "self_recall"}
ONE_KEY_HEAD: dict[str, Any] = {"mixer": "blend", "window": 16, "sinks": 4, "kept": KEPT}


@pytest.fixture(scope="module")
def one_key_head(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of which two devices have the same key head."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(teacher, num_key_value_heads=1)
    folder = tmp_path_factory.mktemp("one_key_head")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_pages_of_other_sizes_on_each_device(linearized: Callable[..., Path]) -> None:
    folder = linearized(**RECOMMENDED | {"layers": [0, 2], "split": SPLIT})
    assert_same(by_vllm(folder, lengths=FEW, tensor_parallel_size=2)[0], by_generate(folder, FEW), CODED)


def test_a_key_head_on_both(one_key_head: Path, linearized: Callable[..., Path]) -> None:
    folder = linearized(one_key_head, **ONE_KEY_HEAD)
    assert_same(by_vllm(folder, lengths=FEW, tensor_parallel_size=2)[0], by_generate(folder, FEW), EXACT)


def test_what_cannot_be_divided(one_key_head: Path, linearized: Callable[..., Path]) -> None:
    folder = linearized(one_key_head, **ONE_KEY_HEAD | {"state_heads": "query"})
    with pytest.raises(ValueError, match=r"chosen by what all 4 query heads of a key head recall.*use at most 1"):
        by_vllm(folder, tensor_parallel_size=2)
