"""Files as people have them: names, links, and content that is not what the name says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lolcats.config import DataConfig, SourceConfig
from lolcats.data import build_datasets, iter_records, read_documents
from lolcats.errors import DataError


def texts(source: Path | str) -> list[str]:
    return [record["text"].strip() for record in iter_records(str(source)) if "text" in record]


@pytest.mark.parametrize("name", ["a.TXT", "a.Txt.Gz", "a.JSONL", "a.Json", "a.PARQUET"])
def test_endings_in_capitals(name, write_lines, tmp_path):
    if name.endswith("PARQUET"):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"text": ["x"]}), tmp_path / name)
    else:
        plain, array = name.lower().startswith("a.txt"), name == "a.Json"
        write_lines(name.replace("Gz", "gz"), ["x" if plain else [{"text": "x"}] if array else {"text": "x"}])
        (tmp_path / name.replace("Gz", "gz")).rename(tmp_path / name)
    assert texts(tmp_path / name) == texts(tmp_path) == ["x"]


def test_links_to_folders_are_followed_once(write_lines, tmp_path):
    write_lines("data/a.txt", ["a"])
    write_lines("elsewhere/b.txt", ["b"])
    for link, target in (("other", "elsewhere"), ("again", "elsewhere"), ("loop", "data")):
        (tmp_path / "data" / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    for source in (tmp_path / "data", f"{tmp_path}/data/**/*.txt"):
        assert sorted(texts(source)) == ["a", "b"]


def test_links_that_go_nowhere_are_named(write_lines, tmp_path):
    write_lines("data/a.txt", ["a"])
    (tmp_path / "data" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    for source in (tmp_path / "data", f"{tmp_path}/data/*.txt", tmp_path / "data" / "gone.txt"):
        with pytest.raises(DataError, match=r"gone\.txt is a link to a file that is not there"):
            texts(source)


def test_a_folder_that_is_called_like_a_file(write_lines, tmp_path):
    write_lines("data/x.txt/a.txt", ["a"])
    assert texts(tmp_path / "data") == texts(tmp_path / "data" / "x.txt") == ["a"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(write_lines, tmp_path):
    folder = write_lines("data/sub/a.txt", ["a"]).parent
    folder.chmod(0)
    with pytest.raises(DataError, match=r"cannot read the folder .*sub"):
        texts(tmp_path / "data")
    folder.chmod(0o700)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.csv", "hf:FOLDER"),
        ("a.TSV", "hf:FOLDER"),
        ("a.npy", r"\.u16 and \.u32"),
        ("a.jsonl.zst", r"\.jsonl\.gz"),
        ("a.md", "plain text"),
    ],
)
def test_other_files_say_what_to_do(name, said, tmp_path):
    (tmp_path / name).write_text("x")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=rf"has no \.txt, .* file; .*{said}"):
            texts(source)


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "[", "hf:" + "x" * 5000])
def test_names_that_no_file_can_have(source, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(DataError, match=r"matches no file|is missing"):
        texts(source)


def test_tables_are_read_as_the_advice_says(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").write_text("text,n\nx,1\ny,2\n")
    assert texts(f"hf:{tmp_path / 'tables'}") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "}", r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", '{"text": ' + "[" * 900 + "]" * 900 + "}", r'a\.jsonl:2: "text" must be text, got \[\[\['),
        ("a.json", "[" + "9" * 5000 + "]", r"a\.json: broken JSON"),
        ("a.json", "[" * 100_000, r"a\.json: broken JSON"),
        ("a.txt", "x\0y\0", r"a\.txt holds NUL bytes"),
        ("a.parquet", "", r"cannot read .*a\.parquet"),
        ("a.parquet", "PAR1" * 9, r"cannot read .*a\.parquet"),
    ],
)
def test_hostile_content_is_refused_with_its_place(name, content, said, tmp_path):
    first = json.dumps({"text": "fine"}) + "\n" if name == "a.jsonl" else ""
    (tmp_path / name).write_text(first + content)
    with pytest.raises(DataError, match=said) as caught:
        texts(tmp_path / name)
    assert len(str(caught.value)) < 500


IDS = np.arange(1, 41) % 300


@pytest.mark.parametrize(("name", "written"), [("a.u16", "<u2"), ("a.BIN", "<u2"), ("a.u32", "<u4"), ("a.U32", "<u4")])
def test_token_files_of_the_size_that_the_name_says(name, written, tokenizer, tmp_path):
    IDS.astype(written).tofile(tmp_path / name)
    assert np.concatenate([d.ids for d in read_documents([str(tmp_path / name)], "auto", tokenizer)]).tolist() == list(
        IDS
    )


@pytest.mark.parametrize(
    ("name", "written", "said"),
    [
        ("a.bin", "<i8", r"every second uint16 is zero, .*\.u32, int64 must be converted"),
        ("a.bin", "<u4", "every second uint16 is zero"),
        ("a.u16", "<u4", "every second uint16 is zero"),
        ("a.u32", "<i8", "every second uint32 is zero, .*write uint32 ids"),
        ("a.u32", "<u2", r"a\.u32 holds token \d+, but the tokenizer ends at"),
        ("a.bin", ">u2", r"a\.bin holds token \d+, but the tokenizer ends at"),
    ],
)
def test_token_files_of_another_size_are_refused(name, written, said, tokenizer, tmp_path):
    IDS.astype(written).tofile(tmp_path / name)
    with pytest.raises(DataError, match=said):
        read_documents([str(tmp_path / name)], "auto", tokenizer)


def test_an_array_of_numpys_own_format(tokenizer, tmp_path):
    with (tmp_path / "a.bin").open("wb") as file:
        np.save(file, IDS.astype("<u2"))
    with pytest.raises(DataError, match=r"a\.bin is an array of numpy's save; write the bare uint16 ids with tofile"):
        read_documents([str(tmp_path / "a.bin")], "auto", tokenizer)


def test_tokens_that_the_model_lacks_are_named_with_their_source(make_teacher, tokenizer, write_lines, tmp_path):
    """A tokenizer that is larger than the model: harmless until one of its last tokens is in the text."""
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.pad_token = "<new>"
    plain = write_lines("plain.txt", ["the cat sat on the mat and looked at the moon " * 20])
    strange = write_lines("strange.txt", ["the cat <new> sat " * 40])
    np.full(400, size, "<u2").tofile(tmp_path / "ids.u16")
    teacher = make_teacher(vocab_size=size)
    for packing in ("stream", "documents"):
        config = DataConfig(sources=[str(plain)], packing=packing, sequence_length=16, validation_sequences=1)  # type: ignore[arg-type]
        parts = build_datasets(config, tokenizer, 0, teacher=teacher)
        assert max(int(part.ids.max()) for part in parts) < size
    for path, name in ((strange, "strange.txt"), (tmp_path / "ids.u16", "ids.u16")):
        config = DataConfig(sources=[str(path)], sequence_length=16, validation_sequences=1)
        with pytest.raises(DataError, match=rf"{name} holds token {size} \('<new>'\), and the model has {size} of"):
            build_datasets(config, tokenizer, 0, teacher=teacher)
        with pytest.raises(DataError, match=f"{name} holds token {size}"):
            read_documents([str(path)], "auto", tokenizer, vocabulary=size)


@pytest.mark.parametrize("seed", [2**32, 2**80])
def test_large_seeds_order_the_data(seed, tokenizer, write_lines):
    path = write_lines("a.jsonl", [{"text": f"the cat {n} sat on the mat"} for n in range(60)])
    sources = [str(path), SourceConfig(name="passkey", length=512, limit=4)]
    config = DataConfig(sources=sources, sequence_length=64, validation_sequences=1)
    first, second = (build_datasets(config, tokenizer, seed)[0] for _ in range(2))
    other, _ = build_datasets(config, tokenizer, seed + 1)
    assert np.array_equal(first.ids, second.ids) and not np.array_equal(first.ids, other.ids[: len(first)])
