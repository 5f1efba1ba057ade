"""vLLM writes what `generate` writes: every mixer, in pieces and batches, with few pages, from prefixes, compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_plugin.equality import LENGTHS, assert_same, beginning, by_generate, by_vllm

pytestmark = pytest.mark.slow
EXACT, CODED = 1e-3, 0.15
"""Largest differences of log probabilities: of sums in another order, and where these now and then make a code of few
bits another one."""
KEPT = {"pairs": 12, "score": "learned", "fade": 400}
RECOMMENDED: dict[str, Any] = {
    "mixer": "blend", "window": 16, "sinks": 4, "kept": KEPT, "far": "none", "bits": 8, "budget": "heads",
    "start": "matched",
}  # fmt: skip
SPLIT = [[[8, 12], [16, 4]], [[12, 8], [20, 0]]]
"""Two layers whose states take different numbers of bytes."""
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "hybrid with sinks": ({"mixer": "hybrid", "window": 16, "sinks": 4, "fold": 5}, EXACT),
    "hybrid, a state a key head": ({"mixer": "hybrid", "window": 16, "state_heads": "kv", "feature_map": "elu"}, EXACT),
    "hybrid, terraced, with decay": (
        {"mixer": "hybrid", "window": 8, "window_kind": "terraced", "sinks": 2, "decay": "gate"}, EXACT,
    ),
    "hybrid without a window": ({"mixer": "hybrid", "window": 0}, EXACT),
    "hybrid, one layer of three": ({"mixer": "hybrid", "window": 16, "sinks": 4, "layers": [1]}, EXACT),
    "blend as recommended": (RECOMMENDED, CODED),
    "blend, two layers of three": (RECOMMENDED | {"layers": [0, 2], "split": SPLIT}, CODED),
    "blend with a far half": ({"mixer": "blend", "window": 16, "sinks": 4, "kept": KEPT}, EXACT),
    "blend with a recurrence": (
        {"mixer": "blend", "window": 8, "kept": KEPT | {"recall_error": True}, "far": "gated_delta", "bits": 4}, CODED,
    ),
    "a window": ({"mixer": "blend", "window": 32, "sinks": 4, "far": "none"}, EXACT),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "tolerance"), CASES.values(), ids=CASES.keys())
def test_the_texts_of_generate(settings: dict[str, Any], tolerance: float, linearized: Callable[..., Path]) -> None:
    folder = linearized(**settings)
    assert_same(by_vllm(folder)[0], by_generate(folder), tolerance)


@pytest.mark.parametrize("layers", ["all", [0, 2]])
def test_prefixes_are_not_read_again(layers: Any, linearized: Callable[..., Path]) -> None:
    settings = RECOMMENDED | {"layers": layers, "split": SPLIT if layers != "all" else None}
    folder = linearized(**settings)
    first, second = by_vllm(folder, passes=2, enable_prefix_caching=True, block_size=16)
    expected = by_generate(folder)
    assert_same(first, expected, CODED)
    assert_same(second, expected, CODED)
    assert sum(text.cached for text in first) == 0 < sum(text.cached for text in second)
    assert max(text.cached for text in second) >= max(LENGTHS) // 2


def test_fewer_pages_than_requests(linearized: Callable[..., Path]) -> None:
    """Pages are used again, and nothing of the text before stays in them; a prompt of one token has nothing else."""
    folder = linearized(**RECOMMENDED)
    assert_same(by_vllm(folder, num_gpu_blocks_override=3)[0], by_generate(folder), CODED)


@pytest.mark.parametrize("settings", [RECOMMENDED, {"mixer": "hybrid", "window": 16}], ids=["blend", "hybrid"])
def test_bfloat16(settings: dict[str, Any], linearized: Callable[..., Path]) -> None:
    """As far as rounding goes, which another token would make larger."""
    folder = linearized(**settings)
    got = by_vllm(folder, dtype="bfloat16")[0]
    assert_same(beginning(got, 1), beginning(by_generate(folder), 1), 0.5)


def test_compiled_models(linearized: Callable[..., Path]) -> None:
    """One is not taken for another that was compiled before, though vLLM sees the same family and sizes."""
    for settings, tolerance in ({"mixer": "hybrid", "window": 16}, EXACT), (RECOMMENDED, CODED):
        folder = linearized(**settings)
        assert_same(by_vllm(folder, enforce_eager=False)[0], by_generate(folder), tolerance)


def test_texts_beyond_the_context(
    teacher: Path, linearized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks are seen at its end, and pairs that are older than it are dropped."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    short = shutil.copytree(teacher, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    folder = linearized(short, **RECOMMENDED | {"bits": 16})
    assert_same(by_vllm(folder, max_model_len=512)[0], by_generate(folder), EXACT)
