"""Files and folders that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from killing import ENVIRONMENT, KILLED, kill_while_writing
from lolcats.config import load_config
from lolcats.errors import LolcatsError
from lolcats.files import atomic_file, atomic_folder, check_room, hold, remove_leftovers_in, write_text
from lolcats.runs.folder import RunFolder


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for kind, place in (("file", tmp_path / "results.json"), ("folder", tmp_path / "model")):
        kill_while_writing(place, kind)
        assert names(tmp_path) != [] and not place.exists()
        if kind == "file":
            write_text(place, "whole")
        else:
            with atomic_folder(place) as temporary:
                (temporary / "a").write_text("whole")
        assert names(tmp_path) == [place.name]
        place.unlink() if kind == "file" else remove_tree(place)


def remove_tree(folder: Path) -> None:
    for item in folder.iterdir():
        item.unlink()
    folder.rmdir()


def test_leftovers_are_found_in_sub_folders(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    kill_while_writing(tmp_path / "checkpoints" / "last.safetensors", "file")
    kill_while_writing(tmp_path / "model", "folder")
    remove_leftovers_in(tmp_path)
    assert names(tmp_path) == ["checkpoints"] and names(tmp_path / "checkpoints") == []


def test_a_run_that_was_killed_before_it_had_settings_is_begun_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    kill_while_writing(run.config_file, "file")
    assert names(run.path) != []
    with run.held():
        run.prepare(load_config("paper", ["model=x", "name=run"]))
    assert run.config_file.is_file() and len(names(run.path)) == 2  # beside it the lock


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("being written")
        remove_leftovers_in(tmp_path)
        assert temporary.exists()
    assert (tmp_path / "a").read_text() == "being written"


def test_a_folder_that_was_moved_away_is_put_back(tmp_path: Path) -> None:
    kill_while_writing(tmp_path / "model", "folder")  # for a name of a dead process
    (left,) = tmp_path.iterdir()
    moved = left.with_name(left.name.removesuffix(".tmp") + ".old")
    moved.mkdir()
    (moved / "weights").write_text("the only copy")
    remove_leftovers_in(tmp_path)
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "weights").read_text() == "the only copy"


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with atomic_folder(place) as temporary:
        (temporary / "a").write_text("first")
    with pytest.raises(LolcatsError, match=r"cannot write .*untouched"), atomic_folder(place) as temporary:
        (temporary / "a").write_text("second")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "b") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model"] and (place / "a").read_text() == "first"


def test_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_text(tmp_path / "a", "x")
    assert events == ["fsync", "rename", "fsync"]
    events.clear()
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("x")
    assert events == ["fsync", "fsync", "rename", "fsync"]  # the file, the folder, and then the folder around it


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    script = "import bare, sys; from pathlib import Path; from lolcats.files import hold\n"
    script += "try:\n    with hold(Path(sys.argv[1]), 'busy'): print('held')\nexcept ValueError as e: print(e)"
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with hold(tmp_path / "lock", "busy"):
        assert subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True).stdout.strip() == "busy"
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True).stdout.strip() == "held"


def test_what_a_writer_leaves_when_it_is_killed_goes_with_its_folder(tmp_path: Path) -> None:
    """safetensors writes to a file of its own first."""
    target = tmp_path / "a.safetensors"
    code = KILLED.replace("else atomic_file)(place)", "else atomic_file)(place, apart=True)").replace(
        "else temporary)", 'else temporary.parent / ".tmpAb3dEf")'
    )
    place = Path(__file__).parent
    subprocess.run([sys.executable, "-c", code, str(target), "file"], cwd=place, check=False)
    assert [item.name for item in tmp_path.rglob("*") if item.is_file()] == [".tmpAb3dEf"]
    with atomic_file(target, apart=True) as temporary:
        temporary.write_text("whole")
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"] and target.read_text() == "whole"


def test_room_is_looked_for_before(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "there", 1)
    message = r"there needs 1,048,576\.0 GiB, and its disk has .*GiB left; free .*GiB, or go$"
    with pytest.raises(LolcatsError, match=message) as raised:
        check_room(tmp_path / "not" / "there", 1 << 50, "go")
    assert "\n" not in str(raised.value) and not (tmp_path / "not").exists()
