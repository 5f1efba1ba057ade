"""Text that the teacher writes."""

from pathlib import Path

import pytest
import torch

from lolcats.config import DataConfig
from lolcats.data import build_datasets, self_text
from lolcats.data.self_text import SelfText, fingerprint
from lolcats.errors import DataError
from tiny import CHATML


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_text, "BATCH", 4)
    return tmp_path / "cache"


@pytest.fixture
def writer(make_teacher, tokenizer):
    return make_teacher(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


def calls(monkeypatch, made: SelfText) -> list[int]:
    """Numbers of the batches that are written, not read."""
    written: list[int] = []
    write = made._write

    def count(number: int):
        written.append(number)
        return write(number)

    monkeypatch.setattr(made, "_write", count)
    return written


@pytest.mark.slow
def test_chat_models_ask_and_answer(writer, tokenizer):
    records = list(SelfText(writer, tokenizer, 6, 60, 0).records())
    assert len(records) == 6
    assert all(set(record) == {"prompt", "completion"} for record in records)
    assert not any("<end>" in str(text) or "<start>" in str(text) for record in records for text in record.values())


def test_models_without_a_template_write_on(writer, tokenizer):
    tokenizer.chat_template = None
    records = list(SelfText(writer, tokenizer, 6, 20, 0).records())
    assert all(set(record) == {"text"} for record in records)


@pytest.mark.slow
def test_templates_that_end_a_turn_with_ordinary_characters(writer, tokenizer):
    tokenizer.chat_template = CHATML.replace("<end>\n", " [/x]").replace("<start>", "")
    records = list(SelfText(writer, tokenizer, 6, 60, 0).records())
    assert not any("[/x]" in record["prompt"] for record in records if "prompt" in record)


@pytest.mark.slow
def test_same_seed_same_text_and_the_random_state_stays(writer, tokenizer, small, monkeypatch):
    before = torch.random.get_rng_state()
    first = list(SelfText(writer, tokenizer, 6, 60, 0).records())
    assert torch.equal(before, torch.random.get_rng_state())
    monkeypatch.setenv("LOLCATS_CACHE", str(small / "other"))
    torch.manual_seed(5)
    assert list(SelfText(writer, tokenizer, 6, 60, 0).records()) == first
    assert list(SelfText(writer, tokenizer, 6, 60, 1).records()) != first


@pytest.mark.slow
@pytest.mark.parametrize("own", [{"num_beams": 2}, {"min_new_tokens": 9}, {"repetition_penalty": 9.0, "top_k": 1}])
def test_how_the_teacher_would_write_else_is_not_asked(writer, tokenizer, small, monkeypatch, own):
    first = list(SelfText(writer, tokenizer, 4, 60, 0).records())
    monkeypatch.setenv("LOLCATS_CACHE", str(small / "other"))
    writer.generation_config.update(**own)
    assert list(SelfText(writer, tokenizer, 4, 60, 0).records()) == first


@pytest.mark.slow
def test_an_interrupted_teacher_goes_on(writer, tokenizer, small, monkeypatch):
    whole = list(SelfText(writer, tokenizer, 10, 60, 0).records())
    monkeypatch.setenv("LOLCATS_CACHE", str(small / "other"))
    first = SelfText(writer, tokenizer, 10, 60, 0)
    some = [record for record, _ in zip(first.records(), range(5), strict=False)]
    damaged = sorted(first.folder.glob("*.json"))[-1]
    damaged.write_text(damaged.read_text()[:-9])
    again = SelfText(writer, tokenizer, 10, 60, 0)
    written = calls(monkeypatch, again)
    assert list(again.records()) == whole
    assert some == whole[:5]
    assert 0 not in written
    last = SelfText(writer, tokenizer, 10, 60, 0)
    written = calls(monkeypatch, last)
    assert list(last.records()) == whole
    assert not written


def test_other_weights_are_another_teacher(writer, make_teacher, tokenizer):
    name = fingerprint(writer)
    with torch.no_grad():
        next(writer.parameters()).view(-1)[0] += 1
    assert fingerprint(writer) != name
    other = make_teacher(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    assert fingerprint(other) == name


def test_a_teacher_that_says_nothing(writer, tokenizer):
    tokenizer.chat_template = None
    tokenizer.bos_token = None
    with torch.no_grad():  # whatever it reads, it ends at once
        for parameter in writer.parameters():
            parameter.zero_()
        writer.model.embed_tokens.weight[:, 0] = 1
        writer.model.norm.weight[0] = 1
        writer.lm_head.weight[tokenizer.eos_token_id, 0] = 1e4
    with pytest.raises(DataError, match="wrote nothing new in 10 batches"):
        list(SelfText(writer, tokenizer, 3, 20, 0).records())


@pytest.mark.slow
def test_a_run_on_text_of_the_teacher(writer, tokenizer):
    config = DataConfig(sources=[{"name": "self", "limit": 12}], sequence_length=40, validation_sequences=2)  # type: ignore[list-item]
    train, validation = build_datasets(config, tokenizer, 0, teacher=writer)
    assert len(validation) == 2
    assert "<start>assistant" in tokenizer.decode(train.ids.ravel())
