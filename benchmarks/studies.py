"""The studies of configs/studies as one sweep, so that a run which several of them have in common is done once.

python benchmarks/studies.py combine FOLDER STUDY.yaml ... [--set KEY=VALUE ...]
    writes FOLDER/studies.yaml and .json, for `lolcats sweep FOLDER/studies.yaml --jobs N`, whose runs go to FOLDER/all
python benchmarks/studies.py tables FOLDER
    prints a table for each study from the results of that sweep

KEY=VALUE are overrides, as `lolcats sweep` takes them, of every study that does not vary the key itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lolcats.config import CONTROLS, RunConfig, load_config
from lolcats.config.strict_yaml import read_yaml, write_yaml
from lolcats.sweep import Sweep, load_sweep
from lolcats.sweep.measured import AVERAGE
from lolcats.sweep.settings import flat

SWEEP = "all"
"""Name of the joint sweep: its runs and results are in FOLDER/all."""
ENABLED = "transfer.enabled"
JOINED = ("tasks", "recall", "controls")
"""What is measured of all runs if it is measured in one study; the rest of `measure` is that of the first study."""
COLUMNS = {
    "perplexity.transfer": "after transfer", "perplexity.student": "student", "kl.student": "KL",
    "perplexity.window_only": "window only",
}  # fmt: skip
"""Columns of the printed tables beside scores -> their heads; perplexities but for KL."""
NUMBERS = ("perplexity", "kl", "tokens_per_second", "seconds")
"""Kinds of columns that are not benchmarks."""
PLACE = ("name", "runs_dir")
"""Keys that say where a run is, not what it is."""


def settings(config: RunConfig) -> dict[str, Any]:
    """What a run is, with dotted keys; without a first stage its settings do not matter."""
    what = {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in PLACE}
    off = not config.transfer.enabled
    return {key: value for key, value in what.items() if not (off and key.startswith("transfer.") and key != ENABLED)}


def _fitting(study: Path, overrides: list[str]) -> list[str]:
    """Overrides of keys that the study does not vary."""
    content = read_yaml(study.read_text())
    own = {key for part in [content.get("grid") or {}, *(content.get("runs") or [])] for key in flat(part)}
    return [text for text in overrides if text.partition("=")[0] not in own]


def combine(folder: Path, sweeps: list[Sweep]) -> None:
    """Write the sweep of all distinct runs, and which run of it each run of a study is."""
    base = settings(load_config("paper"))
    runs: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    where: dict[str, dict[str, str]] = {}
    for sweep in sweeps:
        for run in sweep.runs:
            what = settings(run.config)
            key = json.dumps(what, sort_keys=True)
            if key not in names:
                names[key] = f"{sweep.name}_{run.name}"
                changed = {name: value for name, value in what.items() if base.get(name) != value}
                runs[key] = {"name": names[key], **changed}
            where.setdefault(sweep.name, {})[run.name] = names[key]
    measures = [sweep.measure.model_dump(mode="json") for sweep in sweeps]
    joined = {key: list(dict.fromkeys(name for m in measures for name in m[key])) for key in JOINED}
    measure = {**measures[0], **joined}
    content = {"name": SWEEP, "base": "paper", "settings": {"runs_dir": str(folder)}, "measure": measure}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "studies.yaml").write_text(write_yaml({**content, "runs": list(runs.values())}))
    (folder / "studies.json").write_text(json.dumps(where, indent=1) + "\n")
    print(f"{len(runs)} distinct runs of {sum(map(len, where.values()))}: {folder / 'studies.yaml'}")


def tables(folder: Path) -> None:
    """Print the rows of each study, in Markdown; scores in percent, the teacher last."""
    results = json.loads((folder / SWEEP / "results.json").read_text())
    rows = {row["name"]: row["columns"] for row in results["runs"]}
    teachers = {row["name"]: dict(row["columns"]) for row in results.get("teachers", [])}
    plain = [row["perplexity.teacher"] for row in rows.values() if row.get("perplexity.teacher")]
    for teacher in teachers.values():
        teacher["perplexity.student"] = plain[0] if len(set(plain)) == 1 else None
    names = dict.fromkeys(name for row in [*rows.values(), *teachers.values()] for name in row)
    scores, recall = [n for n in names if _is_score(n)], _recall(names)
    heads = [*COLUMNS.values(), *map(_head, scores), *(f"{task} {', '.join(at)}" for task, at in recall.items())]
    for study, runs in json.loads((folder / "studies.json").read_text()).items():
        print(f"\n### {study}\n\n| run | " + " | ".join(heads) + " |")
        print("|---" * (1 + len(heads)) + "|")
        for name, combined in [*runs.items(), *((name, name) for name in teachers)]:
            row = rows.get(combined) or teachers.get(combined) or {}
            print(f"| {name} | " + " | ".join(_cells(row, scores, recall)) + " |")


def _cells(row: dict[str, float], scores: list[str], recall: dict[str, list[str]]) -> Iterator[str]:
    for column in COLUMNS:
        yield _show(row.get(column))
    for column in scores:
        yield _percent(row.get(column), 1)
    for task, lengths in recall.items():
        yield ", ".join(_percent(row.get(f"{task}.{length}"), 0) for length in lengths).strip(", ")


def _is_score(column: str) -> bool:
    """Whether a column is a benchmark's; of the controls only the averages are printed."""
    kind, end = column.partition(".")[0], column.rpartition(".")[2]
    if kind in NUMBERS or end.isdecimal():
        return False
    return column.startswith(AVERAGE) or end not in CONTROLS


def _head(column: str) -> str:
    """`piqa.acc` is headed piqa, `tasks.average.window_only` average, window_only."""
    if column.startswith(AVERAGE):
        return column.removeprefix("tasks.").replace(".", ", ")
    return column.rpartition(".")[0] if column.endswith(("acc", "acc_norm")) else column


def _recall(names: Iterable[str]) -> dict[str, list[str]]:
    """Recall tasks -> their lengths in tokens, from columns such as `passkey.512`."""
    found: dict[str, list[str]] = {}
    for task, _, length in (name.rpartition(".") for name in names):
        if length.isdecimal():
            found.setdefault(task, []).append(length)
    return found


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    combining = commands.add_parser("combine")
    combining.add_argument("folder", type=Path)
    combining.add_argument("studies", type=Path, nargs="+")
    combining.add_argument("--set", dest="overrides", metavar="KEY=VALUE", nargs="*", default=[])
    commands.add_parser("tables").add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "tables":
        tables(args.folder)
        return
    combine(args.folder, [load_sweep(study, _fitting(study, args.overrides)) for study in args.studies])


if __name__ == "__main__":
    main()
