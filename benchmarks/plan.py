"""What `lolcats plan` computes beside what was measured, and its rows for models that nobody here has trained.

python benchmarks/plan.py [--scale]

--scale prints the rows of 8B, 70B and 405B in place of the comparison. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from lolcats import load_config
from lolcats.config import RunConfig
from lolcats.models.empty import empty_model
from lolcats.planning import GPUS, Machine, choose_machine, estimate, in_words
from lolcats.planning.hardware import GIB
from lolcats.planning.shapes import ModelShape, linearized, read_model, shape_of
from lolcats.planning.stages import Layout, finetune_plan, transfer_plan

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "2026-11-29-training.json"
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
"""The sizes of SmolLM2-135M."""


@dataclass(frozen=True)
class Comparison:
    """A number that was measured, and the one that is computed."""

    row: dict[str, Any]
    what: str
    computed: float

    @property
    def measured(self) -> float:
        """Tokens a second, or GiB."""
        return float(self.row[self.what])

    @property
    def error(self) -> float:
        """Relative."""
        return self.computed / self.measured - 1


def comparisons() -> Iterator[Comparison]:
    """All numbers of the file of measurements."""
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        if "block" in row:
            yield _of_block(row)
            continue
        layout = Layout(rows=row["sequences"], **row.get("layout", {}))
        settings = [f"batch_size={row['sequences'] * layout.ranks}"]
        settings.append(f"cuda_graph={str(row.get('graphs', True)).lower()}")
        words = [f"{stage}.{word}" for stage in ("transfer", "finetune") for word in settings]
        config = load_config(row["recipe"], [f"data.sequence_length={row['length']}", *words])
        model, machine = _shape(row["model"], config), Machine(GPUS[row["device"]])
        for stage, plan_of in (("transfer", transfer_plan), ("finetune", finetune_plan)):
            if stage not in row:
                continue
            plan = plan_of(model, config, machine, layout)
            yield Comparison(row, stage, plan.tokens / plan.seconds)
            if f"{stage}_peak" in row:
                yield Comparison(row, f"{stage}_peak", plan.memory.tensors / GIB)


def _of_block(row: dict[str, Any]) -> Comparison:
    """A block in the middle, by itself: of all blocks after one another it takes its part of the time."""
    config = load_config(str(ROOT / row["recipe"]))
    model, layout = _shape(row["model"], config), Layout(rows=row["sequences"], block=row["block"], hidden="store")
    plan = transfer_plan(model, config, Machine(GPUS[row["device"]]), layout)
    return Comparison(row, "transfer", plan.tokens / plan.seconds * len(model.layers) / row["block"])


def _shape(name: str, config: RunConfig) -> ModelShape:
    teacher = empty_model(LlamaConfig(**SMOLLM2)) if name == "smollm2" else read_model(name)
    return shape_of(linearized(teacher, config, in_place=True), config)


def print_comparison() -> None:
    """A row for each number."""
    print("| measured on | model, recipe | texts x tokens | what | measured | computed | error |")
    print("|---|---|---|---|---|---|---|")
    for found in comparisons():
        row, digits = found.row, ".1f" if found.what.endswith("peak") else ",.0f"
        note = " (fitted)" if row.get("fitted") else ""
        note += "" if row.get("graphs", True) else ", no graphs"
        note += f", a block of {row['block']}" if "block" in row else ""
        note += "".join(f", {name}" for name in row.get("layout", {}))
        cells = [
            f"{row['device'].upper()}, {row['date']}",
            f"{row['model']}, `{row['recipe']}`{note}",
            f"{row['sequences']} x {row['length']:,}",
            found.what.replace("_", " "),
            f"{found.measured:{digits}}",
            f"{found.computed:{digits}}",
            f"{found.error:+.1%}",
        ]
        print(f"| {' | '.join(cells)} |")


def print_scale() -> None:
    """A row for each model and number of GPUs, by the files of settings that ship."""
    print("| model | H100 | stage 1 | hours | stage 2 | hours | GPU GiB | disk GiB | all, hours | GPU-hours |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size, file in (("8b", "paper"), ("70b", "configs/llama3_70b.yaml"), ("405b", "configs/llama3_405b.yaml")):
        for gpus in (1, 8, 64):
            words = ["evaluation.controls=[]", *([f"finetune.batch_size={gpus}"] if gpus > 8 else [])]
            config = load_config(str(ROOT / file) if "/" in file else file, words)
            found = estimate(f"llama-3-{size}-shape", config, choose_machine("h100", gpus))
            cells = [size.upper(), str(gpus)]
            for choice in found.chosen.values():
                cells += [in_words(choice.plan.layout), f"{choice.plan.seconds / 3600:.2f}"]
            cells.append(" / ".join(f"{choice.plan.memory.needed():.0f}" for choice in found.chosen.values()))
            cells += [f"{found.peak_disk / GIB:,.0f}", f"{found.seconds / 3600:.2f}", f"{found.gpu_hours:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", action="store_true")
    print_scale() if parser.parse_args().scale else print_comparison()
