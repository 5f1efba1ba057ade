"""Files of weights that are read and written a few rows at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lolcats import LolcatsError
from lolcats.models import shards
from lolcats.models.shards import Entry, entries_of, held, read_entries, weight_files, write_shards


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        str(dtype): torch.randn(5, 3, generator=generator).to(dtype)
        for dtype in (torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float8_e4m3fn)
    }
    made |= {str(dtype): torch.arange(7).to(dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.int8)}
    made["flags"] = torch.tensor([True, False, True])
    made |= {"number": torch.tensor(1.5), "empty": torch.zeros(0, 4), "deep": torch.randn(4, 2, 3, generator=generator)}
    return made


@pytest.mark.parametrize("piece", [1, 24, 1 << 20])
@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_what_is_read_and_written_is_the_same(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, limit: int
) -> None:
    monkeypatch.setattr(shards, "PIECE", piece)
    save_file(tensors, tmp_path / "all.safetensors")
    entries = read_entries(tmp_path / "all.safetensors")
    (tmp_path / "model").mkdir()
    files = write_shards(tmp_path / "model", entries, limit)
    assert weight_files(tmp_path / "model") == sorted(files)
    assert len(files) == {1: len(tensors), 10**9: 1}.get(limit, len(files))
    found = {name: t for file in files for name, t in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found[name], tensor))), name


def test_rows_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE", 100)
    save_file({"x": torch.randn(23, 6)}, tmp_path / "x.safetensors")
    pieces = [*read_entries(tmp_path / "x.safetensors")["x"].pieces()]
    assert [len(p) for p in pieces] == [4] * 5 + [3]


def test_sums_and_formats_are_those_of_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE", 40)
    weight, change = torch.randn(9, 5).bfloat16(), torch.randn(9, 5)
    save_file({"x": weight}, tmp_path / "x.safetensors")
    entry = read_entries(tmp_path / "x.safetensors")["x"]
    expected = weight.clone()
    expected += change
    assert torch.equal(torch.cat([*entry.plus(lambda: change).pieces()]), expected)
    wide = weight.float() + change
    got = entry.to(torch.float32).plus(lambda: change).to(torch.bfloat16)
    assert torch.equal(torch.cat([*got.pieces()]), wide.bfloat16()) and got.dtype == torch.bfloat16
    assert torch.equal(next(read_entries(tmp_path / "x.safetensors")["x"].pieces()), weight[:4]), (
        "the file is as it was"
    )


def test_the_index_is_as_transformers_writes_it(tmp_path: Path) -> None:
    write_shards(tmp_path, {name: held(torch.zeros(10)) for name in "abc"}, 80)
    content = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert content == {
        "metadata": {"total_size": 120},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }
    assert {*entries_of(weight_files(tmp_path))} == {*"abc"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path, value: float) -> None:
    entry = held(torch.tensor([[1.0], [value]])).to(torch.float16)
    with pytest.raises(LolcatsError, match=r"^x has values that are not finite .* in float16; choose a wider format"):
        write_shards(tmp_path, {"x": entry})


def test_what_does_not_fit_on_the_disk_is_refused(tmp_path: Path) -> None:
    huge = Entry((1 << 30, 1 << 20), torch.float32, lambda: iter([]))
    with pytest.raises(LolcatsError, match=r"needs .*, and its disk has .* left"):
        write_shards(tmp_path / "not" / "there", {"x": huge})
    assert not [*tmp_path.iterdir()]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "x.safetensors")
    entry = read_entries(tmp_path / "x.safetensors")["x"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(LolcatsError, match=r"cannot read .*x.safetensors"):
        read_entries(tmp_path / "x.safetensors")
    with pytest.raises(LolcatsError, match=r"cannot read x of .*x.safetensors"):
        list(entry.pieces())
