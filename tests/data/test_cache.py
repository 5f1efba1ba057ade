"""The cache of tokens: written once, continued, repaired, shared."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lolcats.config import DataConfig
from lolcats.data import build_datasets, cache, read_documents
from lolcats.data.cache import TokenCache
from lolcats.data.documents import EncodedDocument
from lolcats.data.templates import Template
from lolcats.errors import DataError
from lolcats.files import cache_root

DOCUMENTS = [np.arange(n % 7 + 1, dtype=np.int32) + n for n in range(40)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SHARD_TOKENS", 30)
    return tmp_path / "cache"


class Source:
    """Gives the documents one by one and remembers which ones were asked for; breaks off before `broken`."""

    def __init__(self, broken: int | None = None) -> None:
        self.given: list[int] = []
        self.broken = broken

    def __call__(self, skip: int) -> Iterator[tuple[int, list[EncodedDocument]]]:
        for number in range(skip, len(DOCUMENTS)):
            if number == self.broken:
                raise KeyboardInterrupt
            self.given.append(number)
            yield 1, [EncodedDocument(DOCUMENTS[number], 1)]


def read(source: Source, cap: int | None = None, **identity: Any) -> list[list[int]]:
    return [d.ids.tolist() for d in TokenCache({"name": "x", **identity}, wide=False).read(source, cap)]


EVERYTHING = [ids.tolist() for ids in DOCUMENTS]


def test_the_second_time_nothing_is_tokenised_and_all_is_mapped():
    assert read(Source()) == EVERYTHING
    again = Source()
    documents = TokenCache({"name": "x"}, wide=False).read(again, None)
    assert [d.ids.tolist() for d in documents] == EVERYTHING
    assert [d.prompt_length for d in documents] == [1] * 40
    assert not again.given
    assert len(documents.shards) > 3
    assert all(isinstance(shard, np.memmap) and shard.dtype == "<u2" for shard in documents.shards)


@pytest.mark.parametrize("broken", [0, 1, 17, 39])
def test_an_interruption_loses_nothing(broken):
    first, second = Source(broken), Source()
    with pytest.raises(KeyboardInterrupt):
        read(first)
    assert read(second) == EVERYTHING
    assert first.given + second.given == list(range(40))


def test_a_killed_process_loses_the_open_shard_only(root):
    """What a kill leaves: files that the index does not name yet, and half-written ones."""
    read(Source(), cap=50)
    folder = next((root / "tokens").iterdir())
    (folder / "00099.bin").write_bytes(b"half")
    (folder / ".00099.npy.1.tmp").write_bytes(b"half")
    assert read(Source()) == EVERYTHING
    assert not (folder / "00099.bin").exists()


def test_a_cap_reads_no_further_and_a_larger_one_goes_on():
    first, second, third = Source(), Source(), Source()
    read(first, cap=20)
    assert sum(len(DOCUMENTS[n]) for n in first.given[:-1]) < 20
    read(second, cap=60)
    assert second.given[0] == first.given[-1] + 1
    assert read(third) == EVERYTHING
    assert third.given[0] == second.given[-1] + 1


def test_other_text_has_another_place():
    read(Source(), revision="a")
    other = Source()
    read(other, revision="b")
    assert other.given == list(range(40))


def damage_byte(folder: Path) -> None:
    path = folder / "00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 255
    path.write_bytes(content)


def damage_length(folder: Path) -> None:
    with (folder / "00001.npy").open("ab") as file:
        file.write(b"x")


def damage_missing(folder: Path) -> None:
    (folder / "00001.bin").unlink()


def damage_index(folder: Path) -> None:
    (folder / "index.json").write_text((folder / "index.json").read_text()[:-30])


def damage_type(folder: Path) -> None:
    (folder / "index.json").write_text(json.dumps([1, 2]))


def _replace_table(folder: Path, content: bytes) -> None:
    """Another table of documents, listed with its right size, time and checksum."""
    state = cache._write_bytes(folder / "00001.npy", content)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["files"]["00001.npy"] = state
    (folder / "index.json").write_text(json.dumps(index))


def test_a_table_that_is_no_table_is_made_again(root):
    """Pickled, empty, of another type, or of other tokens: none of it is trusted or run."""
    read(Source())
    folder = next((root / "tokens").iterdir())
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}]), allow_pickle=True)
    tables = [np.zeros((3, 2)), np.zeros((10_000, 2), np.int64), np.full((3, 2), -1)]
    for content in (pickled.getvalue(), b"", b"x" * 200, *map(cache._npy, tables)):
        _replace_table(folder, content)
        mended, after = Source(), Source()
        assert read(mended) == EVERYTHING and mended.given
        assert read(after) == EVERYTHING and not after.given


@pytest.mark.parametrize("name", ["index.json", ".lock", "00001.bin", "00009.npy"])
def test_a_folder_where_a_file_belongs(name, root):
    """Mended, or said in a line."""
    read(Source())
    place = next((root / "tokens").iterdir()) / name
    place.unlink(missing_ok=True)
    (place / "inside").mkdir(parents=True)
    try:
        assert read(Source()) == EVERYTHING
    except DataError as error:
        assert str(place) in str(error) or str(place.parent) in str(error)
        assert "LOLCATS_CACHE=FOLDER" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("damage", [damage_byte, damage_length, damage_missing, damage_index, damage_type])
def test_damage_is_found_and_mended(damage, root):
    read(Source())
    damage(next((root / "tokens").iterdir()))
    mended, after = Source(), Source()
    assert read(mended) == EVERYTHING
    # What lies before the damage is kept, if it is known what that is.
    assert (0 not in mended.given) == ("index" not in damage.__name__ and "type" not in damage.__name__)
    assert read(after) == EVERYTHING
    assert not after.given


def test_a_copied_cache_is_used(root, tmp_path, monkeypatch):
    read(Source())
    shutil.copytree(root, tmp_path / "other")  # other times, same content
    for path in (tmp_path / "other").rglob("*.bin"):
        os.utime(path, (1, 1))
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "other"))
    source = Source()
    assert read(source) == EVERYTHING
    assert not source.given


def test_two_at_once_tokenise_once():
    sources = [Source(), Source()]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(read, sources))
    assert results == [EVERYTHING, EVERYTHING]
    assert sorted(len(source.given) for source in sources) == [0, 40]


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write the cache .*set LOLCATS_CACHE=FOLDER"):
        read(Source())


def test_where_the_cache_is(tmp_path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("LOLCATS_CACHE")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "lolcats"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "lolcats"


# what the tokens of a source depend on


def folders(root: Path) -> int:
    return len(list((root / "tokens").iterdir()))


def test_everything_that_changes_tokens_changes_the_place(root, tokenizer, begin_tokenizer, write_lines):
    path = write_lines("a.jsonl", [{"prompt": "the cat", "completion": "sat"}])
    templates: list[Template] = ["plain", "alpaca", "chat", "plain"]
    tokenizers = [tokenizer, tokenizer, tokenizer, begin_tokenizer]
    for count, (template, made) in enumerate(zip(templates, tokenizers, strict=True), start=1):
        read_documents([str(path)], template, made)
        assert folders(root) == count
    read_documents([str(path)], "plain", tokenizer)
    assert folders(root) == 4
    write_lines("a.jsonl", [{"prompt": "the cat", "completion": "ran"}])
    (document,) = read_documents([str(path)], "plain", tokenizer)
    assert tokenizer.decode(document.ids).endswith("ran<end>")
    assert folders(root) == 5


def test_padding_and_truncation_of_an_earlier_call_do_not(root, tokenizer, write_lines):
    path = write_lines("a.jsonl", [{"text": "the cat"}])
    tokenizer.pad_token = "<start>"
    read_documents([str(path)], "plain", tokenizer)
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=3)
    read_documents([str(path)], "plain", tokenizer)
    assert folders(root) == 1


def test_datasets_are_the_same_from_the_cache_and_in_pieces(tokenizer, write_lines, monkeypatch):
    path = write_lines("a.jsonl", ({"text": f"the cat {n} sat on the mat"} for n in range(700)))
    for packing in ("stream", "documents"):
        config = DataConfig(sources=[str(path)], sequence_length=32, packing=packing)  # type: ignore[arg-type]
        first = build_datasets(config, tokenizer, 3)
        with monkeypatch.context() as patch:
            patch.setattr("lolcats.data.packing.IN_MEMORY", 0)
            second = build_datasets(config, tokenizer, 3)
        order = np.random.default_rng(0).permutation(len(first[0]))[:9]
        for left, right in zip(first, second, strict=True):
            for field in ("ids", "loss_mask", "document"):
                assert np.array_equal(getattr(left, field), getattr(right, field))
        for field in ("ids", "loss_mask", "document"):
            mapped = getattr(second[0], field)
            assert not isinstance(mapped, np.ndarray)
            assert np.array_equal(mapped[order], getattr(first[0], field)[order])
            assert np.array_equal(mapped[-3:], getattr(first[0], field)[-3:])
            assert np.array_equal(mapped[2], getattr(first[0], field)[2])
            assert mapped.shape == getattr(first[0], field).shape
