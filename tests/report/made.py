"""Runs that never ran: folders with everything that one writes, by the library's own writers, of numbers made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lolcats.config import dump_config, load_config
from lolcats.evaluation import Measurement
from lolcats.evaluation.analysis import Analysis, write_analysis
from lolcats.evaluation.analysis.file import (
    AnalysedText,
    AttentionSection,
    AttentionText,
    Generation,
    HeadAnalysis,
    KeptAnalysis,
    LayerAnalysis,
    LoraModule,
    LoraSection,
)
from lolcats.evaluation.analysis.maps import Maps, write_maps
from lolcats.evaluation.harness import Row, Score
from lolcats.evaluation.memory import LayerMemory, TextMemory
from lolcats.evaluation.recall import Cell, RecallSettings
from lolcats.files import write_json
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results
from lolcats.training.report import Reporter

EVIL = "<script>document.title='broken'</script><img src=x onerror=alert(1)>\"'&"
"""What a text must not do to a page."""
LAYERS, HEADS, KEY_HEADS, CELLS = 4, 4, 2, 12
PERPLEXITY = {
    "teacher": 10.972987238881320, "training_free": 13.708367153138752, "equal_window": 12.566244097933355,
    "trained_window": 12.266244097933355, "transfer": 12.162051246438836, "student": 11.406641964166317,
    "near_only": 12.106641964166317, "window_only": 13.525275300286262, "linear_only": 45.5, "no_attention": 912.25,
}  # fmt: skip
TASKS, LENGTHS = ("passkey", "niah_single_2", "vt"), (512, 1024, 2048)


def make_run(folder: Path, name: str = "made", *, complete: bool = True, settings: tuple[str, ...] = ()) -> Path:
    """A run with all that a report reads, but a model."""
    config = load_config("recommended", ["name=made", f"runs_dir={folder}", "model=demo", *settings])
    run = RunFolder(folder / name)
    run.path.mkdir(parents=True)
    run.config_file.write_text(dump_config(config))
    run.write_results(make_results(complete))
    write_metrics(run.path)
    write_numbers(run.path)
    write_analysis(run.path, make_analysis(run.path))
    return run.path


def make_results(complete: bool = True) -> Results:
    """What it has measured."""
    positions: dict[str, dict[str, float | None]] = {
        variant: {"1-64": 2 * value, "64-512": 1.1 * value, "512-1024": value} for variant, value in PERPLEXITY.items()
    }
    layers = [
        LayerMemory(layer=n, bytes=98_304, kv_token_bytes=384, kv_tokens=256.0, parts={"window": 128.0, "kept": 128.0})
        for n in range(LAYERS)
    ]
    results = Results(
        date="2026-11-29", model="demo", device="cpu", dtype="bfloat16", seed=0, complete=complete,
        memory=TextMemory(bytes=98_304 * LAYERS, kv_tokens=256.0, layers=layers),
        perplexity=dict(PERPLEXITY), kl={name: 0.01 * n for n, name in enumerate(PERPLEXITY)}, by_position=positions,
        tokens={"transfer": 1_000_000, "finetune": 2_000_000}, notes={"samples": f"failed: {EVIL}"},
        seconds={"loading": 4.0, "transfer": 90.0, "finetune": 600.0, "measuring": 60.0, "total": 800.0},
    )  # fmt: skip
    results.evaluation.segments, results.evaluation.length, results.evaluation.tokens = 16, 1024, 16_368
    return results


def write_metrics(folder: Path) -> None:
    """Both stages, and LoRA beside the second."""
    reporter = Reporter(folder / "metrics.jsonl")
    for stage, start in (("transfer", 8.0), ("finetune", 3.0)):
        for step in range(1, 41):
            loss = {"loss": start / step**0.3, "gradient_norm": 1.0 / step}
            reporter.step(None, stage, step, loss, 1e-3, 50_000.0, 1000 * step)
            if step % 10 == 0:
                layers = [0.01 * (n + 1) / step for n in range(LAYERS)]
                reporter.validation(stage, step, {"loss": 1.1 * loss["loss"], "layers": layers}, 1000 * step)
    lines = [
        {"stage": "finetune", "step": step, "modules": {
            f"layers.{layer}.self_attn.{name}": [0.1 * step * (layer + 1), 1.0 + 0.1 * step] for layer in range(LAYERS)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
         "errors": [0.1 / (step + n + 1) for n in range(LAYERS)]}
        for step in (0, 10, 20, 30, 40)
    ]  # fmt: skip
    (folder / "lora.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_numbers(folder: Path) -> None:
    """The files of recall, evaluate and benchmark, as the verbs write them."""
    about = {"model": str(folder / "model"), "teacher": "demo"}
    asked = RecallSettings(list(TASKS), list(LENGTHS), 20, 5)
    write_json(folder / "recall.json", about | asdict(asked) | {"cells": [asdict(cell) for cell in make_cells()]})
    scores = {
        name: Measurement(value, float(np.log(value)), 0.1, 4096, _beyond(name, value), 2048)
        for name, value in PERPLEXITY.items()
    }
    content = about | {"sources": ["python-docs"], "length": 4096, "last": None}
    write_json(folder / "beyond.json", content | {"scores": {name: asdict(score) for name, score in scores.items()}})
    rows = [
        Row(
            task,
            "acc,none",
            "0",
            100,
            True,
            {name: Score(share, None, 0.05, [share]) for name, share in shares.items()},
        )
        for task, shares in (
            ("piqa", {"teacher": 0.712345678, "student": 0.698765432, "equal_window": 0.6, "trained_window": 0.65}),
            ("arc_easy", {"teacher": 0.6}),
        )
    ]
    write_json(folder / "benchmark.json", about | {"rows": [asdict(row) for row in rows], "results": {}})


def _beyond(name: str, value: float) -> dict[str, float]:
    """Perplexity by position over four times the length of the training: the student holds up to 2,048 tokens."""
    own = {"1-64": 2.0, "64-512": 1.1, "512-1024": 1.0, "1024-2048": 1.02, "2048-4096": 1.3}
    teacher = own | {"2048-4096": 90.0}
    return {place: value * factor for place, factor in (teacher if name == "teacher" else own).items()}


def make_cells() -> Iterator[Cell]:
    """Recall that gets worse with length, and with depth."""
    quality = {"teacher": 1.0, "student": 0.9, "trained_window": 0.2, "window_only": 0.1}
    for task in TASKS:
        for length in LENGTHS:
            for variant, most in quality.items():
                fall = 1.0 if variant == "teacher" else 1 / (1 + max(0, length - 1024) / 512)
                depths = [round(most * fall * (0.6 + 0.1 * n), 3) for n in range(5)] if task != "vt" else []
                score = sum(depths) / 5 if depths else most * fall
                yield Cell(variant, task, length, score, list(depths), [])


def make_analysis(folder: Path) -> Analysis:
    """An analysis with every section, tokens and prompts of which are hostile."""
    layers = [_layer(number) for number in range(LAYERS)]
    kept = [
        KeptAnalysis(
            layer=layer, key_head=head, positions=list(range(layer, 200, 9)), tokens=[EVIL] * len(range(layer, 200, 9)),
            scores=[0.5] * len(range(layer, 200, 9)), candidates=180, stay_mean=40.0, overlap_oracle=0.6,
            overlap_recency=0.1,
        )
        for layer in range(LAYERS)
        for head in range(KEY_HEADS)
    ]  # fmt: skip
    modules = [
        LoraModule(layer=n, projection="q_proj", steps=[1, 2], norm=[0.1, 0.2], effective_rank=[1.0, 2.0])
        for n in range(LAYERS)
    ]
    generations = [
        Generation(
            prompt=EVIL, teacher=f"one two{EVIL}", student="one three", first_difference=1,
            tokens_teacher=["one", f" two{EVIL}"], tokens_student=["one", " three"],
        )
    ]  # fmt: skip
    texts = [AttentionText(name=f"text {EVIL}", tokens=[EVIL, *"abcdefghijk"], length=CELLS, cell=1)]
    digest = write_maps(folder, [Maps(make_map(0), make_map(1))])
    return Analysis(
        model=str(folder), teacher="demo", date="2026-11-29", device="cpu", dtype="bfloat16",
        text=AnalysedText(source="python-docs", segments=2, length=256), layers=layers, kept=kept,
        generations=generations,
        attention=AttentionSection(
            file="analysis.npz", digest=digest, texts=texts, layers=list(range(LAYERS)), heads=list(range(HEADS))
        ),
        lora=LoraSection(modules=modules, layers=list(range(LAYERS)), error_after_lora=[0.1] * LAYERS),
    )  # fmt: skip


def _layer(number: int) -> LayerAnalysis:
    heads = [
        HeadAnalysis(
            head=head, key_head=head // 2, error=0.01 * (head + 1), relative_error=0.1 * (number + 1) + 0.01 * head,
            entropy=1.0 + 0.3 * head, far_share_teacher=0.1 * head, far_share_student=max(4e-4, 0.08 * head),
            kept_share=0.05 * head, share=0.03 * head, window=64 + 8 * head, sinks=4, pairs=32,
            decay=0.99, window_factor=None,
        )
        for head in range(HEADS)
    ]  # fmt: skip
    more: dict[str, Any] = {"error_before": 0.4, "error_transfer": 0.2}
    error = (0.11, 0.52, 0.33, 0.24)[number]
    return LayerAnalysis(
        layer=number, linearized=True, error=error / 2, relative_error=error, entropy=1.5, heads=heads, **more
    )


def make_map(seed: int) -> np.ndarray:
    """Weights [layers, heads, n, n] float32, rows of which add up to 1."""
    weights = np.tril(np.random.default_rng(seed).random((LAYERS, HEADS, CELLS, CELLS), dtype=np.float32) ** 4)
    return weights / weights.sum(-1, keepdims=True)
