"""Several sweep files as one sweep, so that a run which they have in common is done once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lolcats.config import RunConfig, flat, load_config
from lolcats.sweep.job import Studies, Sweep

JOINED = ("tasks", "recall", "controls")
"""What is measured of all runs if it is measured in one study; the rest of `measure` is that of the first study."""
PLACE = ("name", "runs_dir")
"""Keys that say where a run is, not what it is."""


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


def combine(sweeps: Sequence[Sweep], content: dict[str, Any]) -> dict[str, Any]:
    """The content of one sweep file with all distinct runs, which says which of them each run of a study is.

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
    return {"measure": {**measures[0], **joined}, **content, "runs": list(runs.values()), "studies": studies}
