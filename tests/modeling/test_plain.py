"""Models that carry more than weights are refused before anything of them changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from torch.nn.utils import parametrizations
from transformers import LlamaForCausalLM

from lolcats import LinearizationConfig, LolcatsError, convert
from lolcats.errors import DataError


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], **settings)


def added(model: Any, *, disabled: bool = False) -> Any:
    model.add_adapter(lora())
    if disabled:
        model.disable_adapters()
    return model


def prompt_tuned(model: Any) -> Any:
    return get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))


def compiled_in_place(model: Any) -> Any:
    model.compile()
    return model


def patched(model: Any) -> Any:
    model.forward = torch.compile(model.forward)
    return model


def hooked(model: Any) -> Any:
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def normed(model: Any) -> Any:
    parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def partly_absent(model: Any) -> Any:
    model.model.layers[1].to("meta")
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda m: get_peft_model(m, lora()), "peft adapter"),
        (lambda m: get_peft_model(m, lora(use_dora=True)), "peft adapter"),
        (lambda m: get_peft_model(m, IA3Config(target_modules=["k_proj"], feedforward_modules=[])), "peft adapter"),
        (prompt_tuned, "peft adapter"),
        (lambda m: PeftMixedModel(m, lora()), "peft adapter"),
        (lambda m: inject_adapter_in_model(lora(), m), "peft adapter"),
        (added, "peft adapter"),
        (lambda m: added(m, disabled=True), "peft adapter"),
        (torch.compile, "is compiled"),
        (compiled_in_place, "is compiled"),
        (patched, "another forward"),
        (nn.DataParallel, "several processes"),
        (hooked, "hooks"),
        (normed, "parametrized"),
        (partly_absent, "not in memory"),
        (lambda m: nn.Linear(2, 2), "expected a model of transformers"),
    ],
)
def test_refused_and_untouched(teacher: LlamaForCausalLM, change: Callable[[Any], Any], part: str) -> None:
    model = change(teacher)
    before = type(model), type(teacher), type(teacher.config), [type(m) for m in teacher.modules()]
    with pytest.raises(LolcatsError, match=part):
        convert(model, LinearizationConfig(window=4))
    assert before == (type(model), type(teacher), type(teacher.config), [type(m) for m in teacher.modules()])


def test_what_leaves_nothing_behind_is_taken(teacher: LlamaForCausalLM) -> None:
    model: Any = get_peft_model(teacher, lora())
    merged = model.merge_and_unload()
    merged.enable_input_require_grads()  # a hook of transformers itself
    convert(merged, LinearizationConfig(window=4))


@pytest.mark.parametrize(("token", "named"), [(97, "token 97"), (-1, "token -1")])
def test_tokens_beyond_the_embedding(teacher: LlamaForCausalLM, token: int, named: str) -> None:
    ids = torch.tensor([[3, 4, token, 5]])
    with pytest.raises(DataError, match=f"input_ids holds {named}, but the model knows 0 to 96"):
        convert(teacher, LinearizationConfig(window=2, start="matched"), input_ids=ids)
    assert type(teacher) is LlamaForCausalLM
