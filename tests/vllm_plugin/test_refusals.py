"""What linearized models cannot do in vLLM is said in a line, before or while they are loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lolcats.modeling import linearized_layers
from lolcats.printable import show_bytes
from lolcats.serving.vllm_plugin.layout import PageLayout
from vllm_plugin.equality import by_vllm
from vllm_plugin.test_offline import RECOMMENDED

pytestmark = pytest.mark.slow
HYBRID = {"mixer": "hybrid", "window": 8}
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a state in pieces": ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "a state has no tokens"),
    "guesses": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "tokens cannot be taken back from a state",
    ),
    "no memory for a request": ({"kv_cache_memory_bytes": 4096}, r"the states of a request take .*and vLLM has about"),
}


@pytest.fixture(scope="module")
def folder(linearized: Callable[..., Path]) -> Path:
    return linearized(**HYBRID)


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        by_vllm(folder, **options)


def family(name: str, folder: Path, **sizes: Any) -> Path:
    """The folder of a random model of another family."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | sizes)).save_pretrained(folder)
    return folder


def test_a_family_that_vllm_runs_by_other_code(linearized: Callable[..., Path], tmp_path: Path) -> None:
    folder = linearized(family("gpt_neox", tmp_path), **HYBRID)
    with pytest.raises(ValueError, match=r"vLLM runs GPTNeoXForCausalLM by the code of transformers"):
        by_vllm(folder)


def test_a_family_with_layers_that_keep_states(linearized: Callable[..., Path], tmp_path: Path) -> None:
    layers = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 1}
    folder = linearized(family("lfm2", tmp_path, **layers), **HYBRID)
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM has layers with states of its own in vLLM"):
        by_vllm(folder)


def test_learned_sinks(linearized: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1}
    folder = linearized(family("gpt_oss", tmp_path, **sizes), **HYBRID)
    with pytest.raises(ValueError, match=r"attends with learned sinks, which linearized layers do not do in vLLM yet"):
        by_vllm(folder)


def test_weights_that_do_not_fit_the_settings(folder: Path, linearized: Callable[..., Path]) -> None:
    other = linearized(**HYBRID, feature_map="elu")
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"of the mixer of layer 0, feature_k\.weight is missing, left over or"):
        by_vllm(other)


def test_requests_that_wait_are_told_of(linearized: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """In bytes that are counted here from the layers themselves."""
    folder = linearized(**RECOMMENDED)
    model = AutoModelForCausalLM.from_pretrained(folder)
    each = PageLayout.of([layer.mixer.state_spec(torch.float32) for layer in linearized_layers(model)]).nbytes
    vllm = logging.getLogger("vllm")  # whose messages do not come to pytest by themselves
    vllm.addHandler(caplog.handler)
    try:
        by_vllm(folder, kv_cache_memory_bytes=4 * each)
    finally:
        vllm.removeHandler(caplog.handler)
    said = caplog.text
    size = re.escape(show_bytes(each))
    assert re.search(rf"3 linearized layers, whose states take {size} for each request", said)
    assert re.search(r"about 3 requests fit into memory at once, and max_num_seqs is 5: the others wait", said)
