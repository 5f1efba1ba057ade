"""A state as a file: going on from it is going on without it, bit for bit; whatever does not fit is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

import lolcats
from lolcats import LolcatsError, continue_from, load_state, save_state

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")

BLEND: dict[str, Any] = {"mixer": "blend", "window": 4}
LAYERS = [
    pytest.param({"window": 6, "fold": 4}, id="sliding"),
    pytest.param({"window": 4, "sinks": 2, "window_kind": "terraced"}, id="terraced"),
    pytest.param({"window": 6, "sinks": 2, "decay": "gate", "state_heads": "kv", "layers": [0, 2]}, id="gate-mixed"),
    pytest.param({"window": 0, "sinks": 0}, id="linear"),
    pytest.param({**BLEND, "sinks": 2, "kept": {"pairs": 3}}, id="kept"),
    pytest.param({**BLEND, "far": "gated_delta", "state_dtype": "bfloat16", "layers": [1]}, id="delta-mixed"),
    pytest.param(
        {**BLEND, "far": "none", "bits": 8, "sinks": 1, "split": [[4, 2], [[2, 0], [5, 3]], [[3, 1], [6, 1]]]},
        id="8bit-split",
    ),
    pytest.param({**BLEND, "far": "none", "bits": 4, "kept": {"pairs": 4}}, id="4bit"),
]


def read(model: Any, ids: Tensor, **given: Any) -> Any:
    return model(ids, past_key_values=DynamicCache(config=model.config), **given).past_key_values


def write(model: Any, **given: Any) -> Tensor:
    return model.generate(**given, do_sample=False, max_new_tokens=8)


@pytest.fixture
def saved(make_student: Students, tokens: Tokens, tmp_path: Path) -> tuple[Any, Path]:
    """A model and the state of two texts of 20 tokens."""
    student = make_student(window=6, sinks=2, layers=[0, 2])
    save_state(read(student, tokens(2, 20)), tmp_path / "state", student)
    return student, tmp_path / "state"


@pytest.mark.parametrize("settings", LAYERS)
def test_going_on_from_a_file_is_going_on(
    make_student: Students, tokens: Tokens, tmp_path: Path, settings: dict[str, Any]
) -> None:
    student, ids, more = make_student(**settings), tokens(2, 23), tokens(2, 5, 1)
    cache, path = read(student, ids), tmp_path / "new" / "state.safetensors"
    save_state(cache, path, student)
    student.save_pretrained(tmp_path / "model")
    other: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    other.generation_config.eos_token_id = None
    loaded = load_state(path, other)
    assert loaded.get_seq_length() == 23
    written = write(other, **continue_from(loaded, more))
    assert torch.equal(written, write(student, **continue_from(cache, more)))
    whole = student.generate(torch.cat([ids, more], 1), do_sample=False, max_new_tokens=8)
    assert torch.equal(written[:, 5:], whole[:, 28:])
    expected = student(more, past_key_values=cache).logits
    assert torch.equal(other(more, past_key_values=loaded).logits, expected)  # which no question has changed
    assert not torch.equal(student(more).logits, expected)


def test_generate_takes_all_tokens_too(saved: tuple[Any, Path], tokens: Tokens) -> None:
    student, path = saved
    ids = torch.cat([tokens(2, 20), tokens(2, 3, 1)], 1)
    got = write(student, input_ids=ids, past_key_values=load_state(path, student))
    assert torch.equal(got, write(student, input_ids=ids))


def test_models_with_sliding_windows_of_their_own(
    build: Callable[..., Any], make_student: Students, tokens: Tokens, tmp_path: Path
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    student = make_student(build("gemma3_text", sliding_window=7, layer_types=kinds), window=5, sinks=1)
    cache, more = read(student, tokens(1, 20)), tokens(1, 9, 1)
    save_state(cache, tmp_path / "state", student)
    loaded = load_state(tmp_path / "state", student)
    for part in more.split([1, 4, 4], 1):
        assert torch.equal(student(part, past_key_values=loaded).logits, student(part, past_key_values=cache).logits)


def test_bfloat16_stays_as_it_is(make_student: Students, tokens: Tokens, tmp_path: Path) -> None:
    student = make_student(window=4, sinks=2, layers=[0, 1]).to(torch.bfloat16)
    cache = read(student, tokens(1, 20))
    save_state(cache, tmp_path / "state", student)
    loaded = load_state(tmp_path / "state", student)
    more = tokens(1, 4, 1)
    assert torch.equal(student(more, past_key_values=loaded).logits, student(more, past_key_values=cache).logits)
    with pytest.raises(LolcatsError, match=r"read in torch.bfloat16, and this model is in torch.float32; load the mod"):
        load_state(tmp_path / "state", make_student(window=4, sinks=2, layers=[0, 1]))


def test_one_text_many_questions(make_student: Students, tokens: Tokens) -> None:
    student, ids, more = make_student(window=6, layers=[0, 2]), tokens(1, 20), tokens(3, 6, 1)
    more[1, :4] = 0  # a shorter question, padded on its left
    together = write(student, **continue_from(read(student, ids), more, (more > 0).long()))
    for row, start in enumerate((0, 4, 0)):
        alone = write(student, input_ids=torch.cat([ids, more[row : row + 1, start:]], 1))
        assert torch.equal(together[row, 6:], alone[0, 26 - start :])


def test_texts_with_padding(make_student: Students, tokens: Tokens, tmp_path: Path) -> None:
    ids, more = tokens(2, 20), tokens(2, 3, 1)
    ids[0, :8] = 0
    mask = (ids > 0).long()
    for layers in ("all", [0, 2]):
        student = make_student(window=6, layers=layers)
        save_state(read(student, ids, attention_mask=mask), tmp_path / "state", student, overwrite=True)
        cache = load_state(tmp_path / "state", student)
        if layers != "all":
            with pytest.raises(LolcatsError, match="pass the attention mask of all tokens"):
                continue_from(cache, more)
        whole = torch.cat([mask, mask.new_ones(2, 3)], 1)
        got = write(student, **continue_from(cache, more, None if layers == "all" else whole))
        alone = write(student, input_ids=torch.cat([ids[:1, 8:], more[:1]], 1))
        assert torch.equal(got[0, 3:], alone[0, 15:])


def test_wrong_numbers_of_rows_and_columns(saved: tuple[Any, Path], tokens: Tokens) -> None:
    cache = load_state(saved[1], saved[0])
    with pytest.raises(LolcatsError, match="for the 2 texts of the cache, one row each; got 3 rows"):
        continue_from(cache, tokens(3, 4))
    with pytest.raises(LolcatsError, match=r"\[2, 4\] of the new tokens, or \[2, 24\] of all; got \[2, 5\]"):
        continue_from(cache, tokens(2, 4), torch.ones(2, 5))


def test_a_file_that_is_there_stays(saved: tuple[Any, Path], tokens: Tokens) -> None:
    student, path = saved
    before = path.read_bytes()
    with pytest.raises(LolcatsError, match="is there already; choose another name, or pass overwrite=True"):
        save_state(read(student, tokens(1, 5)), path, student)
    assert path.read_bytes() == before
    save_state(read(student, tokens(1, 5)), path, student, overwrite=True)
    assert load_state(path, student).get_seq_length() == 5 and [p.name for p in path.parent.iterdir()] == ["state"]


def test_tensors_have_the_names_of_the_state(saved: tuple[Any, Path]) -> None:
    tensors = load_file(saved[1])
    assert {"layers.0.linear.kv", "layers.0.length", "layers.1.keys", "layers.2.window.k"} <= tensors.keys()
    assert tensors["layers.1.keys"].shape == (2, 2, 20, 6)


def test_states_of_other_models_are_refused(
    saved: tuple[Any, Path], make_student: Students, teacher: LlamaForCausalLM
) -> None:
    student, path = saved
    changed = copy.deepcopy(student)
    changed.lm_head.weight[5, 3] += 1
    others = {
        "by one with other weights or settings": changed,
        r"layer 0 has sinks.k of \[2, 2, 6\], expected \[2, 1, 6\]": make_student(window=6, sinks=1, layers=[0, 2]),
        "layer 0 has no sinks.k": make_student(window=6, layers=[0, 2]),
        r"layers are \[0, 2\], expected \[0, 1, 2\]": make_student(window=6, sinks=2),
        "expected a linearized model": teacher,
    }
    for message, model in others.items():
        with pytest.raises(LolcatsError, match=message) as error:
            load_state(path, model)
        assert "\n" not in str(error.value)
    load_state(path, student)


def test_caches_that_cannot_be_saved(
    make_student: Students, teacher: LlamaForCausalLM, tokens: Tokens, tmp_path: Path
) -> None:
    student, path = make_student(window=4), tmp_path / "state"
    static = student(tokens(), past_key_values=StaticCache(student.config, max_cache_len=40)).past_key_values
    with lolcats.attention_mode(student, "equal_window"):
        window = read(student, tokens())
    caches = {
        "expected a cache with which a text was read; layer 0 holds nothing": DynamicCache(config=student.config),
        "layer 0 is a DynamicLayer": read(teacher, tokens()),
        "layer 0 of the cache is a StaticLinearizedLayer": static,
        "the cache does not fit the model: layer 0 (has|lacks)": window,
    }
    for message, cache in caches.items():
        with pytest.raises(LolcatsError, match=message):
            save_state(cache, path, student)
    assert not path.exists()


def test_files_that_are_no_whole_state(saved: tuple[Any, Path], tmp_path: Path) -> None:
    student, path = saved
    content, broken = path.read_bytes(), tmp_path / "broken"
    flipped = bytearray(content)
    flipped[-100] ^= 4
    for damaged in (content[:-50], content[:20], b"", bytes(flipped)):
        broken.write_bytes(damaged)
        with pytest.raises(LolcatsError, match=r"cannot read the state|is damaged"):
            load_state(broken, student)
    with pytest.raises(LolcatsError, match="cannot read the state"):
        load_state(tmp_path / "none", student)
    save_file(load_file(path), broken)
    with pytest.raises(LolcatsError, match="holds no state that save_state wrote"):
        load_state(broken, student)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["facts"])
    assert facts["tokens"] == 20 and facts["layers"][1] == {"kind": "DynamicLayer", "seen": 20, "whole": True}
    save_file(load_file(path), broken, metadata | {"lolcats_state": "9"})
    with pytest.raises(LolcatsError, match="has format 9, expected 1"):
        load_state(broken, student)
