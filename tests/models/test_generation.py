"""Texts of our own are written by our own settings, whatever the model's generation settings ask for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import lolcats
from lolcats import LolcatsError
from lolcats.errors import DataError
from lolcats.modeling.cache_contents import cache_bytes
from lolcats.models import generation
from lolcats.models.generation import encode, sample, write_tokens


@pytest.fixture
def model(make_teacher: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_teacher(vocab_size=len(tiny_tokenizer))


@pytest.mark.parametrize(
    "settings",
    [
        {"stop_strings": ["e"]},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True},
        {"num_beams": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"cache_implementation": "static"},
        {"max_length": 2},
        {"min_length": 50},
        {"forced_eos_token_id": 3},
        {"repetition_penalty": 9.0},
        {"temperature": 5.0},
        {"guidance_scale": 3.0},
        {"eos_token_id": [10**6], "pad_token_id": -5},
        {"suppress_tokens": [1, 2]},
        {"use_cache": False},
    ],
)
def test_settings_of_the_model_do_not_reach_samples(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]
) -> None:
    wanted = sample(model, tiny_tokenizer, "the river", 8)
    assert model.generation_config is not None
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    assert sample(model, tiny_tokenizer, "the river", 8) == wanted
    assert model.generation_config.to_dict() == before


def test_the_end_of_a_text_is_the_models(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tiny_tokenizer, "the river")
    long = write_tokens(model, tiny_tokenizer, ids, max_new_tokens=8)
    assert model.generation_config is not None and long.shape[1] == ids.shape[1] + 8
    model.generation_config.eos_token_id = [int(long[0, ids.shape[1]])]
    assert write_tokens(model, tiny_tokenizer, ids, max_new_tokens=8).shape[1] == ids.shape[1] + 1


def test_predictions_that_are_no_numbers(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(LolcatsError, match="NaN or infinite"):
        sample(model, tiny_tokenizer, "the river")


def test_long_prompts_of_a_linearized_model_are_read_in_pieces(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 40)[None] % len(tiny_tokenizer)
    whole = {"teacher": write_tokens(model, tiny_tokenizer, ids, max_new_tokens=3)}
    lolcats.convert(model, lolcats.LinearizationConfig(mixer="blend", window=6, kept={"pairs": 4, "score": "recency"}))
    whole["student"] = write_tokens(model, tiny_tokenizer, ids, max_new_tokens=3)
    monkeypatch.setattr(generation, "PIECE", 15)
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(write_tokens(model, tiny_tokenizer, ids, max_new_tokens=3), whole["student"])
    assert calls[:3] == [15, 15, 7]
    with lolcats.attention_mode(model, "softmax"):
        assert torch.equal(write_tokens(model, tiny_tokenizer, ids, max_new_tokens=3), whole["teacher"])


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.uses: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(id(tensor))
                weakref.finalize(tensor, self._drop, id(tensor), storage.data_ptr(), storage.nbytes())
                self.uses[storage.data_ptr()] += 1
                self.bytes += storage.nbytes() if self.uses[storage.data_ptr()] == 1 else 0
        self.peak = max(self.peak, self.bytes)
        return out

    def _drop(self, tensor: int, place: int, size: int) -> None:
        self.known.discard(tensor)
        self.uses[place] -= 1
        self.bytes -= size if self.uses[place] == 0 else 0


def test_a_gpu_reads_more_at_once(
    make_student: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all texts together, but not where layers that keep softmax attention mask all that came before."""
    whole, part = make_student(window=4), make_student(window=4, layers=[0])
    assert generation.piece_of(whole) == generation.piece_of(part) == generation.PIECE
    monkeypatch.setattr(generation, "main_device", lambda _: torch.device("cuda"))
    assert [generation.piece_of(whole, texts) for texts in (1, 2, 64)] == [16_384, 8_192, 2_048]
    assert generation.piece_of(part) == generation.PIECE


@pytest.mark.parametrize(
    "layer", [{"window": 8, "sinks": 2}, {"mixer": "blend", "window": 8, "bits": 8, "kept": {"pairs": 8}}], ids=str
)
def test_memory_does_not_grow_with_the_prompt(
    make_teacher: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, layer: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """But for the tokens themselves; and in the end there is one state, the cache's own."""
    monkeypatch.setattr(generation, "PIECE", 32)
    teacher = make_teacher(num_hidden_layers=1, vocab_size=len(tiny_tokenizer))
    model = lolcats.convert(teacher, lolcats.LinearizationConfig(**layer), seed=0)
    peaks = {}
    write_tokens(model, tiny_tokenizer, torch.full((1, 40), 5), max_new_tokens=2)  # what is made once
    for length in (96, 384):
        cache, held = DynamicCache(config=model.config), Held()
        with held:
            write_tokens(model, tiny_tokenizer, torch.full((1, length), 5), max_new_tokens=2, past_key_values=cache)
        peaks[length] = held.peak
        assert held.bytes == cache_bytes(cache)
    assert peaks[384] - peaks[96] <= 4 * 8 * (384 - 96), f"{peaks}: more than ids, mask and a copy of each"


@pytest.mark.parametrize("prompt", ["", "a\udcffb"])
def test_prompts_that_are_no_text(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    with pytest.raises(DataError):
        sample(model, tiny_tokenizer, prompt)


def test_tokens_that_the_model_does_not_know(
    make_teacher: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"the prompt holds token \d+, but the model knows 0 to 19 "):
        sample(make_teacher(vocab_size=20), tiny_tokenizer, "the river")


def test_a_table_of_positions_ends(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=0, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    with pytest.raises(LolcatsError, match="context of 24"):
        sample(model, tiny_tokenizer, "the river", 40)
    assert sample(model, tiny_tokenizer, "the river")  # as much as there is room for
