"""Several sweep files as one sweep, so that a run which they have in common is done once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lolcats.config import RunConfig, load_config
from lolcats.sweep.job import Studies, Sweep

JOINED = ("tasks", "recall", "controls")
"""What is measured of all runs if it is measured in one study; the rest of `measure` is that of the first study."""
PLACE = ("name", "runs_dir")
"""Keys that say where a run is, not what it is."""


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"finetune": {"rank": 4}} and {"finetune.rank": 4} as {"finetune.rank": 4}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}.")
        elif not (value is None and name in RunConfig.model_fields):  # a section whose lines are all commented out
            found[name] = value
    return found


def what_it_is(config: RunConfig) -> dict[str, Any]:
    """The settings of a run by which it is told from others; without a first stage its settings do not matter."""
    off = not config.transfer.enabled
    settings = flat(config.model_dump(mode="json", exclude={*PLACE}))
    unread = {key for key in settings if off and key.startswith("transfer.") and key != "transfer.enabled"}
    return {key: value for key, value in settings.items() if key not in unread}


def fitting(study: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """The overrides of keys that a study, the content of a sweep file, does not vary itself."""
    runs = [run for run in study.get("runs") or [] if isinstance(run, dict)]
    grid = study.get("grid")
    own = {key for part in [grid if isinstance(grid, dict) else {}, *runs] for key in flat(part)} | {*PLACE}
    return [text for text in overrides if text.partition("=")[0] not in own]


def combine(sweeps: Sequence[Sweep], content: dict[str, Any]) -> tuple[dict[str, Any], Studies]:
    """The content of one sweep file with all distinct runs, and which run of it each run of a study is.

    Args:
        sweeps: the studies.
        content: of the file that names them; `base`, and `measure` if it is there, are its own.
    """
    base = what_it_is(load_config(content.get("base", "recommended")))
    runs: dict[str, dict[str, Any]] = {}
    studies: Studies = {}
    for sweep in sweeps:
        for run in sweep.runs:
            what = what_it_is(run.config)
            changed = {name: value for name, value in what.items() if base.get(name, what) != value}
            joint = runs.setdefault(json.dumps(what, sort_keys=True), {"name": f"{sweep.name}_{run.name}", **changed})
            studies.setdefault(sweep.name, {})[run.name] = joint["name"]
    measures = [sweep.measure.model_dump(mode="json") for sweep in sweeps]
    joined = {key: list(dict.fromkeys(name for measure in measures for name in measure[key])) for key in JOINED}
    return {"measure": {**measures[0], **joined}, **content, "runs": list(runs.values())}, studies
