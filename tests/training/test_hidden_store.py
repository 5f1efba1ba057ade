"""Hidden states on disk: written by one process, read by another, and refused where they are not what was asked for."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import forked
from lolcats.errors import LolcatsError
from lolcats.training.blocks.store import HiddenStore, disk_bytes

IDENTITY: dict[str, Any] = {
    "model": "9f3c", "data": "77aa", "settings": {"sequence_length": 32, "seed": 0}, "boundary": 4
}  # fmt: skip
WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_hidden_store import IDENTITY, states
from lolcats.training.blocks.store import HiddenStore
with HiddenStore(Path("states"), IDENTITY, ahead=2) as store:
    for step in range({steps}):
        if not store.has(f"train-{{step:06}}"):
            store.write(f"train-{{step:06}}", states(step, {tokens}))
"""


def states(step: int, tokens: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    hidden = torch.randn(2, tokens, 8, generator=generator)
    return {"hidden": hidden.bfloat16(), "document": torch.arange(tokens).expand(2, -1), "kept": hidden[..., 0] > 0}


def same(found: dict[str, Tensor], step: int, tokens: int = 6) -> bool:
    wanted = states(step, tokens)
    kinds = {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}
    return kinds and all(torch.equal(found[name], t) for name, t in wanted.items())


def start_writer(folder: Path, steps: int, tokens: int) -> Any:
    script = WRITER.format(here=str(Path(__file__).parent), steps=steps, tokens=tokens)
    (folder / "writer.py").write_text(script)
    return forked.start(["writer.py"], folder, dict(os.environ))


@contextmanager
def largest_file(count: int) -> Iterator[None]:
    """Files of this process cannot become longer, as where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with HiddenStore(tmp_path / "a" / "b", IDENTITY) as store:
        for step in range(9):
            held = states(step)
            store.write(f"train-{step:06}", held)
            assert store.has(f"train-{step:06}")
            held["hidden"].zero_()  # the caller may go on with it
        store.flush()
        assert all(store.has(f"train-{step:06}") for step in range(9))
        store.prefetch(f"train-{step:06}" for step in range(2, 9))
        assert all(same(store.read(f"train-{step:06}"), step) for step in (5, 0, 8, 2, 3, 4, 1, 6, 7, 5))
        store.drop("train-000003")
        store.drop("train-000003")
        assert not store.has("train-000003")
    assert len(list((tmp_path / "a" / "b").iterdir())) == 8
    assert same(load_file(tmp_path / "a" / "b" / "train-000004.safetensors"), 4), "it is safetensors"


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with HiddenStore(tmp_path / name, dict(sorted(IDENTITY.items()))) as store:
            store.write("validation-000", states(1))
    first, second = (tmp_path / name / "validation-000.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_no_more_than_ahead_is_held(tmp_path: Path) -> None:
    with HiddenStore(tmp_path, IDENTITY, ahead=2) as store:
        for step in range(12):
            store.write(f"train-{step:06}", states(step, 4096))
            assert len(list(tmp_path.glob("train-*"))) >= step - 1, "at most two are not on the disk"
        store.flush()
        store.prefetch(f"train-{step:06}" for step in range(12))
        deadline = time.monotonic() + 10
        while len(store._reading.ready) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # in which a third would come
        assert sorted(store._reading.ready) == ["train-000000", "train-000001"]
        assert same(store.read("train-000007"), 7, 4096), "what is asked for does not wait for a place"


@pytest.mark.slow
def test_a_reader_follows_a_writer_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    """Two processes; nothing on the way is half a file, and nothing of the dead one is left."""
    steps, tokens = 40, 20_000
    writer = start_writer(tmp_path, steps, tokens)
    with HiddenStore(tmp_path / "states", IDENTITY, ahead=2) as store:
        store.prefetch(f"train-{step:06}" for step in range(3))
        assert all(same(store.read(f"train-{step:06}", wait=60), step, tokens) for step in range(3))
        writer.kill()
        writer.join()
        there = sorted((tmp_path / "states").glob("train-*"))
        assert 3 <= len(there) < steps, (tmp_path / "out").read_text()
        assert all(same(store.read(file.stem), int(file.stem[6:]), tokens) for file in there)
        with pytest.raises(LolcatsError, match=r"train-000039.* is not there after 0\.2 seconds.*run the job"):
            store.read("train-000039", wait=0.2)
        writer = start_writer(tmp_path, steps, tokens)
        for step in range(steps):
            assert same(store.read(f"train-{step:06}", wait=60), step, tokens)
            if step > len(there):  # the writer looks whether the first ones are there
                store.drop(f"train-{step:06}")
        writer.join()
        assert writer.exitcode == 0, (tmp_path / "out").read_text()
    assert sorted((tmp_path / "states").iterdir()) == sorted(
        {*there, tmp_path / "states" / f"train-{len(there):06}.safetensors"}
    )


@pytest.mark.slow
def test_every_byte_is_checked(tmp_path: Path) -> None:
    """One bit of each byte, and each length, of a file."""
    with HiddenStore(tmp_path, IDENTITY) as store:
        store.write("train-000000", states(0, 1))
    file = tmp_path / "train-000000.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    reader = HiddenStore(tmp_path, IDENTITY, remedy="make it with `lolcats block 2`")
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(LolcatsError, match=r"train-000000.*is damaged: .*; make it with `lolcats block 2`"):
            reader.read("train-000000")
        assert reader.has("train-000000") is (place >= header), "what is not whole is written again"
    for length in (0, 7, 8, header - 1, header, len(whole) - 1, len(whole) + 1):
        file.write_bytes((whole + b"x")[:length])
        with pytest.raises(LolcatsError, match=r"train-000000.*is damaged: .*bytes"):
            reader.read("train-000000")
        assert not reader.has("train-000000")
    reader.prefetch(["train-000000"])
    with pytest.raises(LolcatsError, match="is damaged"):  # from the thread that reads ahead, too
        reader.read("train-000000")
    reader.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "0000"}, r'of another model \("9f3c", expected "0000"\)'),
        ({"data": "0000"}, r'of other data \("77aa", expected "0000"\)'),
        (
            {"settings": {"sequence_length": 64, "seed": 0}},
            r"made with other settings \(sequence_length 32, expected 64\)",
        ),
        ({"boundary": 8, "model": "1"}, r"of another boundary \(4, expected 8\) and of another model"),
    ],
)
def test_states_of_something_else_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with HiddenStore(tmp_path, IDENTITY) as store:
        store.write("validation-001", states(1))
    with HiddenStore(tmp_path, IDENTITY | change) as other:
        for look in (other.read, other.has):
            with pytest.raises(LolcatsError, match=rf"validation-001.* holds hidden states {said}.*; delete it"):
                look("validation-001")
    os.replace(tmp_path / "validation-001.safetensors", tmp_path / "validation-002.safetensors")
    with pytest.raises(LolcatsError, match=r"of validation-001 \(expected validation-002\)"):
        HiddenStore(tmp_path, IDENTITY).read("validation-002")


def test_a_full_disk_is_said_and_leaves_whole_files(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path, IDENTITY)
    store.write("train-000000", states(0, 100))
    store.flush()
    with largest_file(5000):
        store.write("train-000001", states(1, 100))
        with pytest.raises(LolcatsError, match=r"cannot write .*train-000001.*untouched"):
            store.flush()
    with pytest.raises(LolcatsError, match="train-000001"):
        store.write("train-000002", states(2))
    with pytest.raises(LolcatsError, match="train-000001"):
        store.close()
    assert [file.name for file in tmp_path.iterdir()] == ["train-000000.safetensors"]
    with pytest.raises(ZeroDivisionError), largest_file(5000), HiddenStore(tmp_path, IDENTITY) as other:
        other.write("train-000001", states(1, 100))
        raise ZeroDivisionError  # what went wrong first is what is seen


def test_bytes_on_the_disk() -> None:
    # 40 million tokens of a model with 16,384 numbers a token, 2 bytes each, at 3 boundaries
    assert disk_bytes(40_000_000, 16_384, torch.bfloat16, 3) == 3 * 2 * 16_384 * 40_000_000
    assert disk_bytes(10, 8, torch.float32, 1, validation_tokens=2) == 12 * 8 * 4


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LolcatsError, match=r"cannot write .*file"):
        HiddenStore(tmp_path / "file" / "states", IDENTITY)
