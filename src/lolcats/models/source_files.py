"""The files of a teacher's weights, without reading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lolcats.errors import LolcatsError
from lolcats.models.shards import INDEX, WEIGHTS, weight_files
from lolcats.models.teacher import explained

SAMPLES, SAMPLE = 64, 64
"""Places of each file that are looked at, spread evenly, and bytes of each."""


def source_files(source: str) -> list[Path]:
    """The safetensors of a model in a folder, or on the hub, from which they are fetched.

    Raises:
        LolcatsError: there are none.
    """
    if Path(source).is_dir():
        return weight_files(Path(source))
    with explained(source):
        index = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            return [Path(file) for file in get_checkpoint_shard_files(source, index)[0] or ()]
        file = cached_file(source, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise LolcatsError(f"{source} has no safetensors, from which blocks of layers are read; save the model again "
                           "with save_pretrained, or set transfer.blocks.size to null")  # fmt: skip
    return [Path(file)]


def source_digest(source: str) -> str:
    """Digest of the files' sizes and of some bytes of each, in a moment; weights that differ differ everywhere."""
    found = hashlib.sha256()
    for path in source_files(source):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(number * size // SAMPLES)
                found.update(file.read(SAMPLE))
    return found.hexdigest()
