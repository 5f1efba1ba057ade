"""analysis.json and analysis.npz: what is written comes back, and what is broken is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis import Analysis, Maps, read_analysis, read_maps, write_analysis
from lolcats.evaluation.analysis.file import FILE, MAPS, AttentionSection, AttentionText, HeadAnalysis, LayerAnalysis
from lolcats.evaluation.analysis.maps import decode, encode, map_bytes, write_maps

FACTS: dict[str, Any] = {"model": "m", "date": "2026-01-01", "device": "cpu", "dtype": "float32"}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    heads = [HeadAnalysis(head=0, key_head=0, error=0.1 + 0.2, decay=None, window=4)]
    layers = [
        LayerAnalysis(layer=0, linearized=True, error=1e-300, heads=heads),
        LayerAnalysis(layer=1, linearized=False),
    ]
    analysis = Analysis(**FACTS, layers=layers, notes={"a": "b"})
    write_analysis(tmp_path, analysis)
    assert read_analysis(tmp_path) == analysis
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """What is not finite is null in the file, and not known when it is read."""
    write_analysis(tmp_path, Analysis(**FACTS, layers=[LayerAnalysis(layer=0, linearized=True, error=float("nan"))]))
    assert "NaN" not in (tmp_path / FILE).read_text()
    found = read_analysis(tmp_path)
    assert found is not None and found.layers is not None and found.layers[0].error is None


def test_nothing_and_what_a_later_version_adds(tmp_path: Path) -> None:
    assert read_analysis(tmp_path) is None
    (tmp_path / FILE).write_text(json.dumps({**FACTS, "colour": "blue"}))
    found = read_analysis(tmp_path)
    assert found is not None and found.model_dump()["colour"] == "blue" and found.layers is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is not JSON"),
        ('{"model": "m"}', "date: Field required"),
        (json.dumps({**FACTS, "version": 9}), "is of version 9 and this one reads up to 1"),
        (json.dumps({**FACTS, "layers": [{"layer": "0", "linearized": True}]}), r"layers.0.layer: .* \(got '0'\)"),
    ],
)
def test_broken_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(LolcatsError, match=message) as caught:
        read_analysis(tmp_path)
    assert "lolcats report" in str(caught.value)


def random_maps(cells: int, seed: int, negative: bool = False) -> Maps:
    """Rows that sum to 1, of two layers and three heads."""
    generator = np.random.default_rng(seed)
    weights = np.tril(generator.random((2, 2, 3, cells, cells)) ** 4 - 0.3 * negative)
    return Maps(*(weights / np.abs(weights).sum(-1, keepdims=True)).astype(np.float32))


@pytest.mark.parametrize("negative", [False, True])
def test_codes(negative: bool) -> None:
    """No root is off by more than half a step, and 0 is 0."""
    values = random_maps(11, 0, negative).student
    codes, low, high = encode(values)
    assert codes.shape == (2, 3, 66) and codes.dtype == np.uint8 and (low < 0).any() == negative
    step = (high - low)[..., None] / 255
    back = decode(codes, low, high)
    roots = [np.sign(x) * np.sqrt(np.abs(x)) for x in (values, back)]
    assert (np.abs(roots[1] - roots[0]) <= 0.51 * step + 1e-6).all() and not np.triu(back, 1).any()
    np.testing.assert_allclose(back.sum(-1), values.sum(-1), atol=0.02)
    if not negative:
        assert not back[values == 0].any()
    assert codes.nbytes + low.nbytes + high.nbytes == 6 * map_bytes(11) / 2


def test_rows_of_zeros() -> None:
    values = np.zeros((1, 1, 4, 4), dtype=np.float32)
    assert np.array_equal(decode(*encode(values)), values)


def section_of(maps: list[Maps], digest: str) -> AttentionSection:
    texts = [AttentionText(name="a", tokens=["x"] * part.teacher.shape[-1], length=50, cell=5) for part in maps]
    return AttentionSection(file=MAPS, digest=digest, texts=texts, layers=[0, 2], heads=[0, 1, 2])


def test_maps_come_back(tmp_path: Path) -> None:
    maps = [random_maps(11, 0), random_maps(6, 1)]
    section = section_of(maps, write_maps(tmp_path, maps))
    for wrote, found in zip(maps, read_maps(tmp_path, section), strict=True):
        for one, other in zip(wrote, found, strict=True):
            np.testing.assert_allclose(one, other, atol=1 / 250)
    assert [file.name for file in tmp_path.iterdir()] == [MAPS]
    assert section.digest == write_maps(tmp_path, maps)  # the same bytes each time


def test_maps_that_are_not_those_of_the_analysis(tmp_path: Path) -> None:
    maps = [random_maps(5, 0)]
    section = section_of(maps, write_maps(tmp_path, maps))
    with pytest.raises(LolcatsError, match=r"expected maps \(2, 1, 5, 5\)"):
        read_maps(tmp_path, section.model_copy(update={"heads": [0]}))
    write_maps(tmp_path, [random_maps(5, 3)])
    with pytest.raises(LolcatsError, match="is not the one of the analysis beside it"):
        read_maps(tmp_path, section)
    (tmp_path / MAPS).unlink()
    with pytest.raises(LolcatsError, match="cannot be read"):
        read_maps(tmp_path, section)
