"""Runs with as many numbers as those of SmolLM2-135M: 30 layers of 9 heads in 3 groups, 600 steps a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lolcats.config import load_config
from lolcats.evaluation.analysis import Analysis
from lolcats.evaluation.analysis.file import (
    AnalysedText,
    Generation,
    HeadAnalysis,
    KeptAnalysis,
    LayerAnalysis,
)
from lolcats.evaluation.recall import Cell
from lolcats.report import Subject
from lolcats.report.charts.attention import TextMaps
from lolcats.report.measured import RecallFile
from lolcats.variants import TRAINED_WINDOW

from .made import make_results

LAYERS, HEADS, KEY_HEADS, PAIRS, CANDIDATES, CELLS = 30, 9, 3, 256, 972, 48
STEPS, VALIDATIONS = 600, 24
DRAWN = 1
"""Runs with recall, for its pictures take seconds."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def large_subject(number: int) -> Subject:
    """One run, every number of which differs from those of others."""
    rng = np.random.default_rng(number)
    subject = Subject(f"recommended-{number}", Path(f"runs/{number}"), load_config("recommended"), make_results())
    subject.metrics = [line for stage in ("transfer", "finetune", TRAINED_WINDOW) for line in _metrics(rng, stage)]
    subject.lora = [_lora(rng, 20 * n) for n in range(VALIDATIONS)]
    subject.analysis = Analysis(
        model="model", teacher="teacher", date="2026-11-29", device="cuda", dtype="bfloat16",
        text=AnalysedText(source="wikitext-2", segments=2, length=1024),
        layers=[_layer(rng, n) for n in range(LAYERS)],
        kept=[_kept(rng, layer, head) for layer in range(LAYERS) for head in range(KEY_HEADS)],
        generations=[_generation(f"prompt {n}") for n in range(4)],
    )  # fmt: skip
    cells = [Cell(v, t, n, 0.5, list(rng.random(10).round(2)), []) for v in ("teacher", "student", "equal_window")
              for t in ("passkey", "niah_single_2") for n in (1024, 2048, 4096)]  # fmt: skip
    if number < DRAWN:
        subject.recalls = [RecallFile(file=Path("recall.json"), cells=cells)]
    return subject


def large_maps(number: int) -> TextMaps:
    """Its maps of attention."""
    rng = np.random.default_rng(number)
    maps = [rng.random((LAYERS, HEADS, CELLS, CELLS), dtype=np.float32) for _ in range(2)]
    return TextMaps(f"run {number}", [" token"] * CELLS, list(range(LAYERS)), list(range(HEADS)), *maps)


def _metrics(rng: np.random.Generator, stage: str) -> list[dict[str, Any]]:
    names = ("lr", "tokens_per_second", "loss", "gradient_norm", "recall_gap")
    lines = [
        {"stage": stage, "step": step, "tokens": 8192 * step} | dict(zip(names, rng.random(5).tolist(), strict=True))
        for step in range(1, STEPS + 1)
    ]
    for step in range(0, STEPS, STEPS // VALIDATIONS):
        layers = rng.random(LAYERS).tolist()
        lines.append({"stage": stage, "step": step, "validation_loss": rng.random(), "validation_layers": layers})
    return lines


def _lora(rng: np.random.Generator, step: int) -> dict[str, Any]:
    names = [f"layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in PROJECTIONS]
    modules = dict(zip(names, rng.random((len(names), 2)).tolist(), strict=True))
    return {"stage": "finetune", "step": step, "modules": modules, "errors": rng.random(LAYERS).tolist()}


def _layer(rng: np.random.Generator, number: int) -> LayerAnalysis:
    names = ("error", "relative_error", "entropy", "far_share_teacher", "far_share_student", "kept_share", "share")
    heads = [
        HeadAnalysis(
            head=head, key_head=head // KEY_HEADS, window=64, sinks=4, pairs=PAIRS, decay=rng.random(),
            window_factor=rng.random(), **dict(zip(names, rng.random(len(names)).tolist(), strict=True)),
        )
        for head in range(HEADS)
    ]  # fmt: skip
    error, relative, entropy, before, transfer = rng.random(5).tolist()
    return LayerAnalysis(
        layer=number, linearized=True, error=error, relative_error=relative, entropy=entropy, heads=heads,
        error_before=before, error_transfer=transfer,
    )  # fmt: skip


def _kept(rng: np.random.Generator, layer: int, head: int) -> KeptAnalysis:
    positions = np.sort(rng.choice(CANDIDATES, PAIRS, replace=False)).tolist()
    return KeptAnalysis(
        layer=layer, key_head=head, positions=positions, tokens=[f" token{position}" for position in positions],
        scores=rng.normal(size=PAIRS).tolist(), candidates=CANDIDATES, stay_mean=rng.random(),
        overlap_oracle=rng.random(), overlap_recency=rng.random(),
    )  # fmt: skip


def _generation(prompt: str) -> Generation:
    sides = {side: [f" {side}{n}" for n in range(64)] for side in ("teacher", "student")}
    whole: dict[str, Any] = {side: "".join(words) for side, words in sides.items()}
    return Generation(prompt=prompt, first_difference=0, tokens_teacher=sides["teacher"],
                      tokens_student=sides["student"], **whole)  # fmt: skip
