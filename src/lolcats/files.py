"""Files that are whole or not there: written beside their place, brought to the disk, then renamed.

A process that is killed while it writes leaves `.NAME.HOST-PID.tmp` beside NAME. Whoever writes NAME next removes what
dead processes of this machine left (`remove_leftovers`); what a living one is writing stays.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from lolcats.errors import DataError, LolcatsError
from lolcats.printable import show_bytes

_HOST = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname()) or "host"
_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<host>[A-Za-z0-9_]+)-(?P<pid>\d+)\.(?P<kind>tmp|old)$", re.DOTALL)


def cache_root() -> Path:
    """The folder of everything that can be made again: LOLCATS_CACHE, else `lolcats` in the user's cache folder."""
    if own := os.environ.get("LOLCATS_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "lolcats"


@contextmanager
def text_of(name: str, raw: BinaryIO) -> Iterator[io.TextIOWrapper]:
    """UTF-8 text, unpacked where the name ends in .gz.

    Raises:
        DataError: it cannot be read, or is no such text; also for what is read inside.
    """
    try:
        opened = gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw
        with io.TextIOWrapper(opened, encoding="utf-8-sig") as text:  # type: ignore[arg-type]
            yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {name}: {error}") from error


def read_json_object(file: Path, then: str) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none.

    Args:
        then: what can be done with a broken one.

    Raises:
        LolcatsError: it cannot be read, or holds something else.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise LolcatsError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise LolcatsError(f"{file} cannot be used: it is not JSON ({error}); {then}") from error
    if not isinstance(content, dict):
        raise LolcatsError(f"{file} cannot be used: it holds {str(content)[:40]!r} where an object is expected; {then}")
    return content


def read_json_lines(name: str, raw: BinaryIO) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a .jsonl or .jsonl.gz file, one a line, each with "name:line"; blank lines are passed over.

    Raises:
        DataError: see `text_of`; or a line is no JSON object, which is named.
    """
    with text_of(name, raw) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_object(line, f"{name}:{number}"), f"{name}:{number}"


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists inside lists
        raise DataError(f"{where}: broken JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {line.strip()!r:.60}")
    return row


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text atomically; raises as `atomic_file` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write what JSON can spell, `finite`, and other values as their text; raises as `atomic_file` does."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False, default=str) + "\n")


def finite(value: Any) -> Any:
    """Lists and dictionaries with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises as `atomic_file` does."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_file(path: Path, apart: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end, when its content is on the disk.

    Args:
        path: of the file.
        apart: in a temporary folder, for writers that make temporary files of their own, as safetensors does: what they
            leave when they are killed is removed with the folder.

    Raises:
        LolcatsError: the disk is full or the place cannot be written; what was there before is untouched then.
    """
    temporary = _beside(path, "tmp")
    file = temporary / path.name if apart else temporary
    try:
        remove_leftovers(path)
        if apart:
            temporary.mkdir(parents=True)
        yield file
        _flush(file)
        os.replace(file, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        _discard(temporary)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end; what was there before is deleted only then.

    Raises:
        LolcatsError: the disk is full or the place cannot be written; everything is as before then.
    """
    temporary, old = _beside(folder, "tmp"), _beside(folder, "old")
    try:
        remove_leftovers(folder)
        temporary.mkdir(parents=True)
        yield temporary
        for item in [*temporary.rglob("*"), temporary]:
            _flush(item)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        _discard(temporary)
        _discard(old)


def remove_leftovers(path: Path) -> None:
    """Remove what dead processes of this machine left while they wrote `path`.

    A folder that one of them had moved away and not yet replaced is put back first.
    """
    if not path.parent.is_dir():
        return
    for item in _leftovers(path.parent, path.name):
        if item.name.endswith(".old") and not path.exists():
            os.replace(item, path)
        else:
            _discard(item)


def remove_leftovers_in(folder: Path) -> None:
    """As `remove_leftovers`, for everything in `folder` and its sub-folders; only for a folder that is ours alone."""
    for parent in [folder, *(item for item in folder.rglob("*") if item.is_dir() and not item.is_symlink())]:
        if parent.is_dir():  # else it was part of a leftover
            for item in list(_leftovers(parent)):
                found = _LEFTOVER.match(item.name)
                assert found is not None
                remove_leftovers(parent / found["name"])


def check_room(folder: Path, size: int, otherwise: str = "choose another") -> None:
    """Raise LolcatsError where a folder's disk has not the room for `size` bytes; its parents need not be there."""
    place = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), Path("/"))
    if size > (free := shutil.disk_usage(place).free):
        lacking = f"{show_bytes(size)}, and its disk has {show_bytes(free)} left; free {show_bytes(size - free)}"
        raise LolcatsError(f"{folder} needs {lacking}, or {otherwise}")


@contextmanager
def hold(file: Path, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file; the system releases it when this process ends, however it ends.

    Args:
        busy: what the error says if another process holds it.
        patience: seconds that it may take until that has ended.

    Raises:
        LolcatsError: another process holds it, or the place cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise LolcatsError(busy) from error
    except OSError as error:
        raise LolcatsError(f"cannot write in {file.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def is_held(file: Path) -> bool:
    """Whether another process holds a lock file; see `hold`."""
    if not file.exists():
        return False
    try:
        with hold(file, ""):
            return False
    except LolcatsError:
        return True


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.{kind}")


def _leftovers(parent: Path, name: str | None = None) -> Iterator[Path]:
    """What dead processes of this machine left in a folder, of one name or of all."""
    for item in sorted(parent.iterdir()):
        found = _LEFTOVER.match(item.name)
        if found and name in (None, found["name"]) and found["host"] == _HOST and not _lives(int(found["pid"])):
            yield item


def _lives(process: int) -> bool:
    """Whether a process of this machine is alive; where that cannot be asked, it is."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a rename must not get there before what it names."""
    if path.is_symlink() or (path.is_dir() and os.name != "posix"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    """Delete what is ours; that it cannot be deleted is no reason to hide why writing failed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _cannot_write(path: Path, error: Exception) -> LolcatsError:
    reason = getattr(error, "strerror", None) or str(error)
    return LolcatsError(f"cannot write {path}: {reason}; what was there before is untouched")
