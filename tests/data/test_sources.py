import builtins
import gzip
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from lolcats.data import iter_records
from lolcats.errors import DataError

ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}
PAIR = {"prompt": "hello", "completion": "world"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def test_python_docs_are_the_topics_in_order():
    texts = [record["text"] for record in iter_records("python-docs") if "text" in record]
    assert texts == [topics[name] for name in sorted(topics)]
    assert sum(map(len, texts)) > 300_000


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_document(name, write_lines):
    path = write_lines(name, ["one", "\ftwo", "drei ä"])
    assert list(iter_records(str(path))) == [{"text": "one\n\ftwo\ndrei ä\n"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("row", [{"text": "one"}, ALPACA, PAIR, CHAT])
def test_json_lines_of_every_shape(name, row, write_lines):
    path = write_lines(name, [{**row, "source": "dropped"}, "", row])
    assert list(iter_records(str(path))) == [row, row]


@pytest.mark.parametrize("given", [{}, {"input": None}, {"input": ""}])
def test_input_may_be_missing(given, write_lines):
    path = write_lines("a.jsonl", [{"instruction": "add", "output": "3", **given}])
    assert list(iter_records(str(path))) == [{"instruction": "add", "input": "", "output": "3"}]


def test_parts_are_preferred_to_a_rendered_text(write_lines):
    path = write_lines("a.jsonl", [{**ALPACA, "text": "Below is ..."}])
    assert list(iter_records(str(path))) == [ALPACA]


def test_blank_texts_are_left_out(write_lines):
    path = write_lines("a.jsonl", [{"text": " \n"}, {"text": "one"}, {"text": ""}])
    assert list(iter_records(str(path))) == [{"text": "one"}]


def test_byte_order_mark_is_not_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert list(iter_records(str(tmp_path / "a.txt"))) == [{"text": "one"}]


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*", "/*/*"])
def test_folder_and_globs_read_sorted(pattern, write_lines, tmp_path: Path):
    write_lines("b.jsonl", [{"text": "b"}])
    write_lines("a.txt", ["a"])
    write_lines("sub/c.txt.gz", ["c"])
    write_lines("README.md", ["ignored"])
    expected = {"": "abc", "/*": "ab", "/**/*": "abc", "/*/*": "c"}[pattern]
    texts = [record["text"].strip() for record in iter_records(f"{tmp_path}{pattern}") if "text" in record]
    assert "".join(texts) == expected


def test_a_file_whose_name_looks_like_a_glob(write_lines):
    assert list(iter_records(str(write_lines("a[1].txt", ["one"])))) == [{"text": "one\n"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": ', "broken JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"body": "x"}', r"got the keys \['body'\]"),
        ('{"text": 3}', '"text" must be text, got 3'),
        ('{"instruction": "x"}', '"output" must be text, got None'),
        ('{"prompt": "x"}', '"completion" must be text'),
        ('{"instruction": "x", "input": ["y"], "output": "z"}', '"input" must be text'),
        ('{"messages": []}', '"messages" must be a list'),
        ('{"messages": ["x"]}', '"messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', '"content" must be text'),
        (r'{"text": "\ud800"}', "broken character"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(line, said, write_lines):
    path = write_lines("a.jsonl", [{"text": "fine"}, "", line])
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{said}"):
        list(iter_records(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\xff', "not UTF-8"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(b"cut short" * 100, mtime=0)[:-9], "cannot read"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.csv", b"x", r"has no \.txt"),
    ],
)
def test_unusable_files(name, content, said, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(iter_records(str(tmp_path / name)))


@pytest.mark.parametrize("source", ["python_docs", "nowhere.txt", "nowhere/*.txt", ""])
def test_unknown_sources_say_what_would_do(source, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"source '{source.replace('*', '.')}' .*python-docs.*hf:NAME"):
        list(iter_records(source))


def test_a_folder_without_text(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no \.txt, \.txt\.gz, \.jsonl"):
        list(iter_records(str(tmp_path)))


@pytest.mark.parametrize(("suffix", "expected"), [("", "train"), ("::validation", "held"), (":default:train", "train")])
def test_hub_names_take_a_configuration_and_a_split(suffix, expected, write_lines, tmp_path: Path, monkeypatch):
    pytest.importorskip("datasets")
    write_lines("set/train.jsonl", [{"text": "train"}])
    write_lines("set/validation.jsonl", [{"text": "held"}])
    monkeypatch.chdir(tmp_path)
    assert list(iter_records(f"hf:./set{suffix}")) == [{"text": expected}]


def test_hub_problems(write_lines, tmp_path: Path, monkeypatch):
    pytest.importorskip("datasets")
    write_lines("set/train.jsonl", [{"body": "x"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"has no split 'none', which 'hf:\./set::none' asks for; it has train"):
        list(iter_records("hf:./set::none"))
    with pytest.raises(DataError, match=r"set row 0: expected"):
        list(iter_records("hf:./set"))
    for source in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(DataError, match="not of the form"):
            list(iter_records(source))


def test_hub_without_the_extra_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(DataError, match=r'pip install "lolcats\[data\]"'):
        list(iter_records("hf:anything"))
