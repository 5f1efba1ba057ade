"""What a folder must hold to be loaded: every tensor, finite, for the model that its config.json describes."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lolcats import LolcatsError, load_teacher
from lolcats.models.config import SIZES
from lolcats.models.weights import PIECE, all_finite, check_finite

Weights = dict[str, Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(
    make_teacher: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    make_teacher(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def student(
    make_teacher: Callable[..., LlamaForCausalLM],
    make_student: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Path:
    make_student(make_teacher(vocab_size=len(tiny_tokenizer)), window=4).save_pretrained(tmp_path / "s")
    tiny_tokenizer.save_pretrained(tmp_path / "s")
    return tmp_path / "s"


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def change_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def rename(weights: Weights) -> None:
    for name in list(weights):
        weights[f"other.{name}"] = weights.pop(name)


def drop_layer(weights: Weights) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        del weights[name]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.pop(Q), ["1 missing", Q]),
        (drop_layer, ["9 missing", "..."]),
        (lambda w: w.update({"model.layers.9.x": torch.ones(2)}), ["1 not part of this model", "model.layers.9.x"]),
        (lambda w: w.update({"model.norm.weight": torch.ones(2)}), ["1 of another shape", "[2] instead of [36]"]),
        (rename, ["missing", "not part of this model"]),
    ],
)
def test_weights_that_are_not_those_of_the_model(folder: Path, change: Any, parts: list[str]) -> None:
    change_weights(folder, change)
    with pytest.raises(LolcatsError, match="do not fit") as caught:
        load_teacher(folder)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_fewer_layers_than_weights(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(LolcatsError, match="9 not part of this model"):
        load_teacher(folder)


def test_what_the_linearization_added_is_missing(student: Path) -> None:
    load_teacher(student)
    change_weights(student, lambda w: [w.pop(name) for name in list(w) if "feature_q" in name])
    with pytest.raises(LolcatsError, match=r"3 missing.*feature_q"):
        load_teacher(student)


def test_another_family_around_the_same_weights(student: Path) -> None:
    change_config(student, base_model_type="gpt2")
    with pytest.raises(LolcatsError):
        load_teacher(student)


def test_a_shard_that_is_not_there(folder: Path) -> None:
    model, _ = load_teacher(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    load_teacher(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(LolcatsError, match=shard.name):
        load_teacher(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none(folder: Path, value: float, dtype: torch.dtype) -> None:
    def damage(weights: Weights) -> None:
        weights[Q] = weights[Q].to(dtype)
        weights[Q][3, 5] = value

    change_weights(folder, damage)
    with pytest.raises(LolcatsError, match=f"NaN or infinity .{Q}"):
        load_teacher(folder)


def test_tied_weights_are_no_missing_ones(
    make_teacher: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_teacher(vocab_size=len(tiny_tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    load_teacher(tmp_path)


def test_finite_numbers_whose_sum_is_not() -> None:
    large = torch.full((8,), 3e38)
    assert all_finite(large) and not all_finite(torch.cat([large, torch.tensor([torch.inf])]))
    late = torch.zeros(PIECE + 3, dtype=torch.bfloat16)
    assert all_finite(late)
    late[-1] = torch.nan
    assert not all_finite(late)


def test_scales_of_quantized_weights_are_looked_at(teacher: LlamaForCausalLM) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    weight.SCB = torch.tensor([1.0, torch.nan])  # type: ignore[attr-defined]  # where bitsandbytes keeps them
    layer: Any = teacher.model.layers[0]
    layer.self_attn.q_proj.weight = weight
    with pytest.raises(LolcatsError, match=r"q_proj\.weight"):
        check_finite(teacher, "m")


@pytest.mark.parametrize(
    ("entries", "part"),
    [
        ({"vocab_size": 10**9}, "vocab_size must be"),
        ({"vocab_size": 9 * 10**6}, "do not belong together"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"num_attention_heads": 2.5}, "num_attention_heads must be"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 must divide"),
        ({"head_dim": 0}, "head_dim must be"),
        ({"num_labels": 10**9}, "num_labels is too large"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"dtype": "evil"}, "evil"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already.*gptq"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "x.X"}}, "run code of its own"),
    ],
)
def test_configurations_that_no_model_has(folder: Path, entries: dict[str, Any], part: str) -> None:
    change_config(folder, **entries)
    with pytest.raises(LolcatsError, match=part):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("entries", "part"),
    [
        ({"window": -1}, "linearization.window"),
        ({"sinks": 10**7}, "linearization.sinks"),
        ({"wndow": 3}, "linearization.wndow: unknown key"),
        ({"feature_map": "../x"}, "linearization.feature_map"),
        ({"decay": "evil"}, "linearization.decay"),
    ],
)
def test_linearizations_that_there_are_not(student: Path, entries: dict[str, Any], part: str) -> None:
    settings = json.loads((student / "config.json").read_text())["linearization"]
    change_config(student, linearization=settings | entries)
    with pytest.raises(LolcatsError, match=part):
        load_teacher(student)


def test_sizes_of_the_largest_models_are_taken() -> None:
    llama_405b = {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    assert all(value < SIZES[name] / 4 for name, value in llama_405b.items())


def test_code_of_a_folder_is_never_run(folder: Path) -> None:
    trap = folder.parent / "ran"
    (folder / "x.py").write_text(f"open({str(trap)!r}, 'w')\n")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "x.X", "AutoModelForCausalLM": "x.Y"})
    with pytest.raises(LolcatsError, match="never does"):
        load_teacher(folder)
    change_config(folder, model_type="llama")
    load_teacher(folder)  # what transformers knows is not taken from the folder
    assert not trap.exists()


def keep(folder: Path, *patterns: str) -> None:
    for file in folder.iterdir():
        if not any(file.match(pattern) for pattern in patterns):
            file.unlink()


@pytest.mark.parametrize(
    ("patterns", "part"),
    [
        ([], "the folder is empty"),
        (["token*", "config.json"], "no weights"),
        (["*.safetensors", "config.json"], "no tokenizer"),
        (["token*"], "a tokenizer alone"),
        (["*.safetensors"], "weights but no config.json"),
    ],
)
def test_folders_that_lack_something(folder: Path, patterns: list[str], part: str) -> None:
    keep(folder, *patterns)
    with pytest.raises(LolcatsError, match=part):
        load_teacher(folder)


def test_places_that_are_no_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good").symlink_to(folder)
    load_teacher(tmp_path / "good")
    for place, part in (("link", "a link to nowhere"), ("gone", "no such folder"), ("m/config.json", "it is a file")):
        with pytest.raises(LolcatsError, match=part):
            load_teacher(tmp_path / place)


def test_home_is_written_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    load_teacher("~/m")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_are_not_opened(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "ran",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(LolcatsError, match="expected safetensors") as caught:
        load_teacher(folder)
    assert "weights_only" not in str(caught.value) and not (folder / "ran").exists()


@pytest.mark.parametrize("size", [0, 3, 30, 100])
def test_truncated_gguf(tmp_path: Path, size: int) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    file.write_bytes((b"GGUF\x03\0\0\0" + b"\x07" * 200)[:size])
    with pytest.raises(LolcatsError, match="no whole GGUF file"):
        load_teacher(file)


def test_adapters_beside_or_instead_of_a_model(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_teacher(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LolcatsError, match=r"it is a peft adapter \(LORA.*merge_and_unload"):
        load_teacher(tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter/adapter_config.json", folder)
    with pytest.raises(LolcatsError, match=r"beside the model lies a peft adapter.*delete adapter_config.json"):
        load_teacher(folder)
