"""Copies of data sets of the hub: the configuration and the split that were asked for, or a refusal, never others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lolcats.config import DataConfig, SourceConfig
from lolcats.data import check_sources, iter_records
from lolcats.errors import DataError

datasets = pytest.importorskip("datasets")
COMMIT = "0123" * 10
SOURCE = "hf:some/wiki:small:validation"
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train*}
  - {split: validation, path: small/valid*}
- config_name: large
  data_files:
  - {split: train, path: large/train*}
  - {split: validation, path: large/valid*}
---
"""


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def wiki(write_lines, tmp_path: Path) -> Path:
    """A repository with two configurations of two splits, without its card."""
    for config in ("small", "large"):
        for split in ("train", "valid"):
            write_lines(f"wiki/{config}/{split}-00000-of-00001.jsonl", [{"text": f"{config} {split}"}])
    return tmp_path / "wiki"


def texts(source: str | SourceConfig, copy: Path | str | None = None) -> list[str]:
    local = None if copy is None else {"some/wiki": str(copy)}
    return [record["text"] for record in iter_records(source, local) if "text" in record]


@pytest.mark.parametrize("card", [True, False])
def test_configuration_and_split_are_those_asked_for(card, wiki):
    """By the card; without one, by folders of the configuration's name."""
    if card:
        (wiki / "README.md").write_text(CARD)
    for config in ("small", "large"):
        for asked, there in (("train", "train"), ("validation", "valid")):
            assert texts(f"hf:some/wiki:{config}:{asked}", wiki) == [f"{config} {there}"]
    if not card:
        assert texts(SOURCE, wiki / "small") == ["small valid"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf:some/wiki:none:validation", r"no configuration 'none' \(found: small, large\)"),
        ("hf:some/wiki", "has the configurations small, large, not the default one"),
        ("hf:some/wiki:small:dev", "no split 'dev' in its configuration 'small', .* it has train, validation"),
        ("hf:some/wiki:small:test", "no split 'test' .* it has train, validation"),
        ("hf:some/wiki:small:train+validation", "no split"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_read(source, said, wiki):
    (wiki / "README.md").write_text(CARD)
    with pytest.raises(DataError, match=said):
        check_sources(DataConfig(sources=[source], local={"some/wiki": str(wiki)}))
    with pytest.raises(DataError, match=said):
        texts(source, wiki)


def test_a_repository_without_a_card_has_no_other_configurations(wiki):
    with pytest.raises(DataError, match=r"no configuration 'none' \(found: default\)"):
        texts("hf:some/wiki:none:validation", wiki)


@pytest.mark.parametrize("config", ["small", "none"])
def test_offline_the_hubs_own_copy_is_read_the_same_way(config, wiki, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--some--wiki"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(wiki, repository / "snapshots" / COMMIT)
    source = f"hf:some/wiki:{config}:validation"
    if config == "small":
        assert texts(source) == ["small valid"]
        assert texts(SourceConfig(name=source, revision=COMMIT)) == ["small valid"]
    else:
        with pytest.raises(DataError, match="no configuration 'none'"):
            texts(source)
    with pytest.raises(DataError, match="is missing"):
        texts(SourceConfig(name=source, revision="f" * 40))


def test_what_datasets_keeps_is_of_the_configuration_split_and_revision(wiki, tmp_path, monkeypatch):
    """The folder that `load_dataset` fills, under the name that it gives to a data set of the hub."""
    from huggingface_hub import constants

    (wiki / "README.md").write_text(CARD)
    for split in ("train", "validation"):
        datasets.load_dataset(str(wiki), "small", split=split, cache_dir=str(tmp_path / "made"))
    (made,) = {path.parent for path in (tmp_path / "made").rglob("dataset_info.json")}
    kept = tmp_path / "kept" / "some___wiki" / "small" / "0.0.0" / "0123"
    shutil.copytree(made, kept)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert texts(SOURCE) == ["small valid"]
    assert texts(SourceConfig(name=SOURCE, revision="0123")) == ["small valid"]
    for source, said in (
        ("hf:some/wiki:large:validation", r"\['small'\]"),
        ("hf:some/wiki:small:dev", 'Unknown split "dev"'),
        (SourceConfig(name=SOURCE, revision="4567"), "revision 0123, not 4567"),
    ):
        with pytest.raises(DataError, match=f"is missing.*{said}"):
            texts(source)


def test_splits_by_names_of_files_as_datasets_reads_them(write_lines, tmp_path):
    write_lines("a/wiki.train.raw.txt", ["train"])
    write_lines("a/wiki.valid.raw.txt", ["one", "two"])
    assert texts("hf:some/wiki::validation", tmp_path / "a") == ["one", "two"]
    write_lines("b/dev.jsonl", [{"text": "dev"}])
    assert texts("hf:some/wiki::validation", tmp_path / "b") == ["dev"]
    with pytest.raises(DataError, match=r"no split 'train', .* it has validation"):
        texts("hf:some/wiki", tmp_path / "b")


def test_a_file_is_what_the_user_says_unless_its_name_says_otherwise(write_lines):
    assert texts(SOURCE, write_lines("wiki.valid.raw.txt", ["x"])) == ["x\n"]
    assert texts(SOURCE, write_lines("wiki.txt", ["x"])) == ["x\n"]
    with pytest.raises(DataError, match=r"wiki\.train\.txt is called after the split train, .* asks for 'validation'"):
        texts(SOURCE, write_lines("wiki.train.txt", ["x"]))


def test_a_download_that_broke_off_is_found(write_lines, tmp_path):
    write_lines("a/data/train-00000-of-00002.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.\* is missing \(1 of 2 files"):
        texts("hf:some/wiki", tmp_path / "a")


def test_saved_folders_say_what_they_hold(wiki, tmp_path):
    (wiki / "README.md").write_text(CARD)
    one = datasets.load_dataset(str(wiki), "small", split="train", cache_dir=str(tmp_path / "made"))
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "held": one}).save_to_disk(tmp_path / "two")
    for place, source, said in (
        ("one", SOURCE, "holds the split 'train', and .* asks for 'validation'"),
        ("one", "hf:some/wiki:large", "holds the configuration 'small', and .* asks for 'large'"),
        ("two", SOURCE, "no split 'validation', .* it has train, held"),
        ("two", "hf:some/wiki:large", "holds the configuration 'small'"),
    ):
        with pytest.raises(DataError, match=said):
            texts(source, tmp_path / place)
    assert texts("hf:some/wiki:small", tmp_path / "one") == texts("hf:some/wiki:small:held", tmp_path / "two")


def test_saved_folders_are_sources_too(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "held": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(str(tmp_path / "one")) == texts(f"hf:{tmp_path / 'one'}") == ["x", "y"]
    assert texts(f"hf:{tmp_path / 'two'}::held") == ["y"]
    with pytest.raises(DataError, match=r"has the splits train, held; name one of them: hf:.*two::train"):
        texts(str(tmp_path / "two"))


def test_a_revision_is_that_of_the_copy_or_refused(wiki, tmp_path):
    asked = SourceConfig(name=SOURCE, revision="0123abc")
    with pytest.raises(DataError, match="does not say that it is of revision 0123abc"):
        texts(asked, wiki)
    notes = wiki / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "README.md.metadata").write_text("0123abc\netag\n1.0\n")
    assert texts(asked, wiki) == ["small valid"]
    with pytest.raises(DataError, match="has no revisions"):
        texts(SourceConfig(name=f"hf:{wiki}:small:validation", revision="x"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.txt", {"revision": "x"}),
        ("a.txt", {"streaming": True}),
        ("python-docs", {"length": 64}),
        ("a.u16", {"limit": 3}),
        ("a.u16", {"columns": {"text": "x"}}),
        ("a.BIN", {"template": "chat"}),
        ("passkey", {"template": "chat"}),
        ("self", {"columns": {"text": "x"}}),
    ],
)
def test_settings_that_a_source_cannot_follow(name: str, settings: dict[str, Any]):
    with pytest.raises(DataError, match=f"'{name}' does not take {next(iter(settings))}, .*leave it out"):
        check_sources(DataConfig(sources=[SourceConfig(name=name, **settings)]))


def test_raw_files_of_a_named_set_are_those_of_the_hub(write_lines, tmp_path):
    write_lines("sample/train.jsonl", [{"text": "x"}])
    local = {"redpajama-sample": str(tmp_path / "sample")}
    with pytest.raises(DataError, match=r"has no files \*_sample\.jsonl"):
        list(iter_records("redpajama-sample", local))
    write_lines("sample/c4_sample.jsonl.gz", [{"text": "y"}])
    assert list(iter_records("redpajama-sample", local)) == [{"text": "y"}]


@pytest.mark.parametrize(
    ("config", "files"), [("..", None), ("small/../small", None), ("a", "[broken"), ("a", "../outside.jsonl")]
)
def test_a_copy_is_never_left(config, files, wiki, write_lines):
    """By a configuration that is a path, or by a card; and what the library says comes in one line."""
    write_lines("outside.jsonl", [{"text": "outside"}])
    if files is not None:
        (wiki / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {files}\n---\n")
    with pytest.raises(DataError, match=r"cannot load|no configuration|not in it") as caught:
        texts(f"hf:some/wiki:{config}:train", wiki)
    assert "\n" not in str(caught.value)


def test_names_that_datasets_knows_are_folders_here(write_lines, tmp_path, monkeypatch):
    """`json` is also a module of the library, and a folder without data is not another one."""
    write_lines("json/train.jsonl", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    assert texts("hf:json") == ["x"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot load 'hf:empty'"):
        texts("hf:empty")
    (tmp_path / "json" / "broken.jsonl").write_text(json.dumps({"text": "y"})[:-3])
    assert texts("hf:json") == ["x"]
