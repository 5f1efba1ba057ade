"""analysis.npz: maps of attention weights in eight bits, the part below the diagonal alone.

Of text number t there are the arrays, L layers, H heads, n cells, T = n (n + 1) / 2:

    teacher_t, student_t              uint8 [L, H, T], the rows of the lower triangle one after the other
    teacher_low_t, student_low_t      float32 [L, H, n], the root of code 0 in each row (0 but for negative weights)
    teacher_high_t, student_high_t    float32 [L, H, n], that of code 255

Between them roots are linear in the code, and a weight is its root's square with the root's sign: many weights are
small, and together they are as much as the large ones.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis.file import ANEW, MAPS, AttentionSection
from lolcats.files import write_bytes

Floats = NDArray[np.float32]
SIDES = ("teacher", "student")


class Maps(NamedTuple):
    """The maps of one text, [L, H, n, n] float32 each."""

    teacher: Floats
    student: Floats


def map_bytes(cells: int) -> int:
    """Bytes of the maps of one head and text, before they are compressed."""
    return len(SIDES) * (cells * (cells + 1) // 2 + 2 * 4 * cells)


def write_maps(folder: Path, maps: Sequence[Maps]) -> str:
    """Write the maps of each text into a folder, atomically; returns the digest for `AttentionSection`."""
    arrays = {}
    for number, both in enumerate(maps):
        for side, values in zip(SIDES, both, strict=True):
            codes, low, high = encode(values)
            arrays |= {f"{side}_{number}": codes, f"{side}_low_{number}": low, f"{side}_high_{number}": high}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(folder / MAPS, content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def read_maps(folder: Path, section: AttentionSection) -> list[Maps]:
    """The maps of each text of an analysis.

    Raises:
        LolcatsError: the file is missing, or is not that of this analysis.
    """
    file = folder / section.file
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != section.digest:
            raise LolcatsError(f"{file} is not the one of the analysis beside it; {ANEW}")
        with np.load(io.BytesIO(content)) as arrays:
            found = [
                Maps(*(decode(*(arrays[f"{side}{part}_{number}"] for part in ("", "_low", "_high"))) for side in SIDES))
                for number in range(len(section.texts))
            ]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, LolcatsError):
            raise
        raise LolcatsError(f"{file} cannot be read ({error}); {ANEW}") from error
    for text, both in zip(section.texts, found, strict=True):
        shape = (len(section.layers), len(section.heads), len(text.tokens), len(text.tokens))
        if not all(part.shape == shape for part in both):
            raise LolcatsError(f"{file}: expected maps {shape}, got {[part.shape for part in both]}; {ANEW}")
    return found


def encode(values: Floats) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Codes [..., T] of maps [..., n, n], and what 0 and 255 stand for in each row."""
    causal = np.tril(np.nan_to_num(values.astype(np.float32)))
    roots = np.sign(causal) * np.sqrt(np.abs(causal))
    low, high = np.minimum(roots.min(-1), 0.0), np.maximum(roots.max(-1), 0.0)
    step = np.where(high > low, (high - low) / 255, 1.0)[..., None]
    codes = np.rint((roots - low[..., None]) / step).astype(np.uint8)
    rows, columns = np.tril_indices(values.shape[-1])
    return codes[..., rows, columns], low, high


def decode(codes: NDArray[np.uint8], low: Floats, high: Floats) -> Floats:
    """`encode` undone, up to half a step of roots; 0 above the diagonal."""
    cells = low.shape[-1]
    rows, columns = np.tril_indices(cells)
    step = ((high - low) / 255)[..., rows]
    values = np.zeros((*low.shape, cells), dtype=np.float32)
    roots = low[..., rows] + codes * step
    values[..., rows, columns] = np.sign(roots) * roots**2
    return values
