"""The commands that are disturbed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from faults.processes import Command

BLOCKS = 3
"""Of the model that is trained by blocks."""
SETTINGS = {
    "device": "cpu", "dtype": "float32", "data.sequence_length": 32, "data.validation_sequences": 2,
    "linearization.mixer": "hybrid", "linearization.window": 8,
    "linearization.start": "matched", "linearization.sinks": 4, "finetune.rank": 2, "transfer.recall.share": 0,
    "finetune.recall.share": 0,
    "transfer.tokens": 384, "transfer.batch_size": 2, "transfer.checkpoint_every": 1, "transfer.validate_every": 2,
    "finetune.tokens": 384, "finetune.batch_size": 2, "finetune.checkpoint_every": 1, "finetune.validate_every": 2,
}  # fmt: skip


@dataclass
class Case:
    """Commands that come one after the other, each of which can be disturbed."""

    name: str
    commands: list[Command]
    files: dict[str, str] = field(default_factory=dict)
    """What lies in the folder before: name -> content."""
    faults: tuple[str, ...] = ("kill",)
    """What may befall it; see `faults.trials`."""
    wanted: dict[str, str] = field(default_factory=dict)
    """File -> digest after an undisturbed run."""


def make_cases(place: Path) -> list[Case]:
    """All of them; in `place` are the models "teacher" and "deeper", and "text.txt"."""
    settings = {**SETTINGS, "data.sources": [str(place / "text.txt")]}
    linearize = ["linearize", str(place / "teacher"), *(f"{key}={value}" for key, value in settings.items())]
    sweep = json.dumps({"model": str(place / "teacher"), **settings, "finetune.merge": False})
    study = f'{{"base": "hybrid", "settings": {sweep}, "grid": {{"finetune.lr": [0.001, 0.01]}}}}'
    run_folder = str(place / "runs" / "run")
    text = ["evaluate", run_folder, "--sources", str(place / "text.txt"), "--json", "scores.json"]
    recall = ["recall", run_folder, "passkey", "--lengths", "600", "--samples", "3", "--json", "r.json"]
    export = ["export", run_folder, "shared", "--format"]
    resume = [*linearize, "--resume"]
    return [
        Case("linearize", [Command([linearize], [resume])], faults=("kill", "full disk")),
        Case("two ranks", [Command([linearize] * 2, [resume] * 2, "ranks")]),
        Case("evaluate", [Command([text])]),
        Case("recall", [Command([recall])]),
        Case("sweep", [Command([["sweep", "study.yaml"]])], files={"study.yaml": study}),
        *(
            Case(f"export {form}", [Command([[*export, form]], [[*export, form, "--overwrite"]])])
            for form in ("merged", "remote-code")
        ),
        *make_block_cases(place, settings),
    ]


def make_block_cases(place: Path, settings: dict[str, object]) -> list[Case]:
    """Stage 1 by blocks, the three ways that there are; each ends when stage 1 is put together."""
    own = {**settings, "model": str(place / "deeper"), "transfer.blocks.size": 1, "name": "blocks"}
    block = ["block", "run.yaml"]
    files = {"run.yaml": json.dumps(nested(own))}
    stitch = Command([[*block, "--stitch"]])
    ways = {
        "blocks, one after the other": [Command([block])],
        "blocks, a rank each": [Command([block] * BLOCKS, together="torchrun")],
        "blocks, a job each": [
            Command([[*block, "--prepare"]]),
            Command([[*block, str(number), "--wait", "20"] for number in range(BLOCKS)]),
            stitch,
        ],
    }
    faults = ("kill", "full disk", "damage", "twice", "missing")
    return [Case(name, commands, files, faults) for name, commands in ways.items()]


def nested(settings: dict[str, object]) -> dict[str, object]:
    """{"a.b": 1} as {"a": {"b": 1}}, for a YAML file."""
    made: dict[str, object] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = made
        for parent in parents:
            inner = place.setdefault(parent, {})
            assert isinstance(inner, dict)
            place = inner
        place[last] = value
    return made
