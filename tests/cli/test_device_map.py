"""`--device-map` of the verbs that load models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run

MAP = {
    "model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
    "model.norm": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.mark.slow
def test_verbs_print_the_same(cli: Run, finished: Path, place: Path) -> None:
    Path("map.json").write_text(json.dumps(MAP))
    Path("rows.jsonl").write_text(json.dumps({"prompt": "the cat"}) + "\n")
    sources = ["--sources", place / "text.txt", "--length", "24", "--dtype", "float32"]
    for words in (
        ["evaluate", finished, *sources, "--control", "near_only"],
        ["evaluate", place / "teacher", *sources],
        ["generate", finished, "the cat", "--max-new-tokens", "6", "--no-stream"],
        ["recall", finished, "--lengths", "420", "--samples", "1", "--control", "none", "--beyond-context"],
    ):
        whole = cli(*words)
        for device_map in ("map.json", "auto"):
            spread = cli(*words, "--device-map", device_map)
            assert (spread.code, spread.out) == (whole.code, whole.out) and whole.code == 0, (whole.err, spread.err)
    for name, options in (("whole", []), ("spread", ["--device-map", "map.json"])):
        done = cli("generate", finished, "--input", "rows.jsonl", "--output", name, "--max-new-tokens", "6", *options)
        assert done.code == 0, done.err
    assert Path("whole").read_text() == Path("spread").read_text()


def test_mistakes_take_one_line(cli: Run, finished: Path) -> None:
    words = ["generate", finished, "the cat", "--device-map"]
    cli(*words, "fast").refused("'fast'", "auto, balanced or FILE.json")
    cli(*words, "auto", "--device", "cpu").refused("--device cpu is one place and --device-map auto several")
    Path("map.json").write_text(json.dumps({"model.layers.9": "cpu"}))
    cli(*words, "map.json").refused("'model.layers.9'")
    cli("generate", "demo", "the cat", "--device-map", "auto").refused("GGUF")
