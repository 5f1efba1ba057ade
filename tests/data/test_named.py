"""Named data sets and the hub, from copies on this machine: what a hub repository holds, and what datasets keeps."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lolcats.config import DataConfig, SourceConfig
from lolcats.data import build_datasets, iter_records
from lolcats.errors import DataError

ALPACA = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(230)]
QUESTION = {"question": "Where?", "choices": {"label": ["A", "B"], "text": ["here", "there"]}, "answerKey": "B"}


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    """The repository as it is downloaded: one JSON list, and a card."""
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "README.md").write_text("A card.")
    (tmp_path / "alpaca" / "alpaca_data_cleaned.json").write_text(json.dumps(ALPACA))
    return tmp_path / "alpaca"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """The repository as it is downloaded: a parquet file a split."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "questions" / "data").mkdir(parents=True)
    datasets.disable_progress_bars()
    for split, count in (("train", 3), ("test", 5)):
        rows = datasets.Dataset.from_list([QUESTION] * count)
        rows.to_parquet(tmp_path / "questions" / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "questions"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network wanted, and the folders in which libraries keep data sets are empty."""
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("name", ["alpaca-cleaned", "hf:yahma/alpaca-cleaned", "hf:yahma/alpaca-cleaned::train"])
def test_a_copy_takes_the_place_of_the_hub(name, alpaca):
    for local in ({name: str(alpaca)}, {"yahma/alpaca-cleaned": str(alpaca / "alpaca_data_cleaned.json")}):
        assert list(iter_records(name, local)) == ALPACA


def test_folders_that_datasets_saved_are_copies_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ALPACA)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows.select(range(3)), "test": rows}).save_to_disk(tmp_path / "splits")
    assert list(iter_records("alpaca-cleaned", {"alpaca-cleaned": str(tmp_path / "one")})) == ALPACA
    assert list(iter_records("alpaca-cleaned", {"alpaca-cleaned": str(tmp_path / "splits")})) == ALPACA[:3]


def test_questions_become_instructions_and_the_test_split_stays_away(alpaca, questions):
    local = {"alpaca-cleaned": str(alpaca), "tau/commonsense_qa": str(questions)}
    records = list(iter_records("alpaca-csqa", local))
    assert records[:-3] == ALPACA
    assert records[-1] == {
        "instruction": "Answer the question by choosing one of the options.",
        "input": "Where?\nA. here\nB. there",
        "output": "B. there",
    }


def test_another_shape_than_the_recipes_is_named_with_its_place(write_lines):
    path = write_lines("q.jsonl", [QUESTION, {"question": "x"}])
    with pytest.raises(DataError, match=r"q\.jsonl:2: expected \"question\", \"choices\""):
        list(iter_records("commonsense-qa", {"commonsense-qa": str(path)}))


def test_the_sample_of_redpajama_is_read_evenly(write_lines, tmp_path):
    for name, count in (("arxiv", 100), ("c4", 1000)):
        write_lines(f"sample/{name}_sample.jsonl", [{"text": name + " text" * 100, "meta": {name: 1}}] * count)
    texts = [
        r["text"] for r in iter_records("redpajama-sample", {"redpajama-sample": f"{tmp_path}/sample"}) if "text" in r
    ]
    assert Counter(text.split()[0] for text in texts) == {"arxiv": 100, "c4": 1000}
    assert 30 <= Counter(text.split()[0] for text in texts[:550])["arxiv"] <= 70


def test_the_first_200_samples_are_held_out_in_the_alpaca_template(alpaca, tokenizer):
    config = DataConfig(sources=["alpaca-cleaned"], local={"alpaca-cleaned": str(alpaca)}, sequence_length=64)
    train, validation = build_datasets(config, tokenizer, seed=0)
    trained, held = (tokenizer.decode(part.ids.ravel()) for part in (train, validation))
    assert "say 199\n" in held or "say 150\n" in held
    assert not any(f"it is {n}<" in trained for n in range(200))
    assert not any(f"it is {n}<" in held for n in range(200, 230))
    assert sum(f"it is {n}<" in held for n in range(200)) >= 198  # all, but for what a last sequence lacks
    assert held.startswith("Below is an instruction that describes a task. Write")
    assert held.count("### Response:") > len(validation) / 2


@pytest.mark.parametrize(("template", "said"), [("chat", "<start>user"), ("plain", "say 3\nit is 3")])
def test_a_template_that_was_asked_for_wins(template, said, alpaca, tokenizer):
    sources: Any = ["alpaca-cleaned"]
    local = {"alpaca-cleaned": str(alpaca)}
    configs = [DataConfig(sources=sources, local=local, template=template, sequence_length=16)]
    sources = [SourceConfig(name="alpaca-cleaned", template=template)]
    configs.append(DataConfig(sources=sources, local=local, template="alpaca", sequence_length=16))
    for config in configs:
        held = tokenizer.decode(build_datasets(config, tokenizer, seed=0)[1].ids.ravel())
        assert said in held
        assert "###" not in held


def test_what_is_missing_where_it_was_looked_for_and_what_to_do(offline):
    for name, hub, key in (
        ("alpaca-cleaned", "yahma/alpaca-cleaned", "alpaca-cleaned"),
        ("redpajama-sample", "togethercomputer/RedPajama-Data-1T-Sample", "redpajama-sample"),
        ("hf:someone/thing", "someone/thing", "someone/thing"),
    ):
        with pytest.raises(DataError) as caught:
            list(iter_records(name))
        message = str(caught.value)
        parts = [name, hub, str(offline / "kept"), str(offline / "hub"), "HF_DATASETS_OFFLINE=1", f"data.local.{key}="]
        assert all(part in message for part in parts)
        assert "\n" not in message


def test_what_datasets_keeps_is_read_without_the_hub(offline, write_lines):
    """The folder that `load_dataset` fills, under the name that it gives to a data set of the hub."""
    import datasets

    datasets.disable_progress_bars()
    write_lines("folder/train.jsonl", ALPACA)
    datasets.load_dataset(str(offline / "folder"), split="train", cache_dir=str(offline / "made"))
    (made,) = [path.parent for path in (offline / "made").rglob("dataset_info.json")]
    kept = offline / "kept" / "yahma___alpaca-cleaned" / "default" / "0.0.0" / made.name
    shutil.copytree(made, kept)
    next(kept.glob("*.arrow")).rename(kept / "alpaca-cleaned-train.arrow")
    info = json.loads((kept / "dataset_info.json").read_text())
    (kept / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "alpaca-cleaned"}))
    assert list(iter_records("alpaca-cleaned")) == ALPACA
    assert list(iter_records("hf:yahma/alpaca-cleaned")) == ALPACA


def test_what_was_downloaded_is_read_without_the_hub(offline, alpaca):
    repository = offline / "hub" / "datasets--yahma--alpaca-cleaned"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    shutil.copytree(alpaca, repository / "snapshots" / "0123")
    assert list(iter_records("alpaca-cleaned")) == ALPACA


def test_columns_and_limits(write_lines):
    path = write_lines("a.jsonl", [{"q": "x", "a": "y", "text": "unused"}] * 5)
    settings = SourceConfig(name=str(path), columns={"prompt": "q", "completion": "a"}, limit=2)
    assert list(iter_records(settings)) == [{"prompt": "x", "completion": "y"}] * 2
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'b' .*got the keys \['a', 'q', 'text'\]"):
        list(iter_records(settings.model_copy(update={"columns": {"text": "b"}})))


def test_copies_that_are_wrong_are_found_at_once(alpaca, tokenizer):
    for local, said in (
        ({"alpaca_cleaned": str(alpaca)}, "alpaca_cleaned, which no source uses; expected one of alpaca-cleaned"),
        ({"alpaca-cleaned": "/nowhere"}, "names /nowhere for 'alpaca-cleaned', but .*matches no file"),
        ({"alpaca-cleaned": str(alpaca / "README.md")}, "has no .txt"),
    ):
        config = DataConfig(sources=["alpaca-cleaned"], local=local)
        with pytest.raises(DataError, match=said):
            build_datasets(config, tokenizer, seed=0)
