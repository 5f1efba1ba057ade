"""What a command has left in its folder, so that it can be compared with what an undisturbed one leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CLOCKS = ("seconds", "per_second", "date", "time", "mtime")
"""Parts of the names of values that differ from run to run."""


def digests(folder: Path) -> dict[str, str]:
    """What is in a folder: relative name -> digest of the content, clocks left out; lock files are no content."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name.endswith(".lock") or name.startswith(("output", "events.")):
            continue
        content = file.read_bytes()
        if name.startswith("cache"):  # its index has times of files in it
            content = b"" if file.suffix == ".json" else content
        elif file.suffix in (".json", ".jsonl", ".csv", ".md"):
            content = without_clocks(content.decode())
        elif file.suffix == ".safetensors":
            content = tensors_without_clocks(content)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """How what was left differs from what should have been, in words."""
    return [
        *(f"{name} is missing" for name in wanted.keys() - found.keys()),
        *(f"{name} should not be there" for name in found.keys() - wanted.keys()),
        *(f"{name} differs" for name in found.keys() & wanted.keys() if found[name] != wanted[name]),
    ]


def without_clocks(text: str) -> bytes:
    """The JSON objects of a file without what a clock put into them."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if not any(word in k for word in CLOCKS)}
        return [strip(item) for item in value] if isinstance(value, list) else value

    try:
        return json.dumps(strip(json.loads(text))).encode()
    except ValueError:
        pass
    try:
        return "\n".join(json.dumps(strip(json.loads(line))) for line in text.splitlines()).encode()
    except ValueError:
        return b""  # tables for people: their numbers are those of the JSON file beside them


def tensors_without_clocks(content: bytes) -> bytes:
    """A safetensors file without the time that a checkpoint's metadata holds."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if "content" in metadata:
        metadata["content"] = without_clocks(metadata["content"]).decode()
    return json.dumps(header, sort_keys=True).encode() + content[8 + size :]
