"""The sweep file: base settings, a grid over keys of a configuration, and named sets of settings.

The runs are every one of `runs` at every point of `grid`. Unknown keys, wrong values, and runs of one name are errors,
collected into one message.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lolcats.config import RunConfig, dump_config, flat, load_config, merged, parse_overrides
from lolcats.config.strict_yaml import read_yaml, write_yaml
from lolcats.data import local_names
from lolcats.errors import ConfigError
from lolcats.sweep.job import RUN, Studies, Sweep, SweepRun, label
from lolcats.sweep.measure import read_measure
from lolcats.sweep.studies import PLACE, combine, fitting
from lolcats.variants import CONTROLS, TRAINED_WINDOW

MAX_RUNS = 256
"""Most runs of one sweep: a grid grows faster than one thinks."""
CONTROLS_KEY = "evaluation.controls"
UNTRAINED = [name for name in CONTROLS if name != TRAINED_WINDOW]
KEYS = ("name", "base", "settings", "grid", "runs", "measure", "studies")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LETTERS = "letters, digits, '.', '_' and '-'"


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file and build the settings of all its runs.

    Args:
        path: a YAML file; docs/sweeps.md explains its keys.
        overrides: `key.sub=value` texts for every run. `name=` and `runs_dir=` say where the sweep's folder is, and
            `measure.key=` changes what is measured.

    Raises:
        ConfigError: no such file, broken YAML, or wrong settings; all of these in one message, a line each.
    """
    file = Path(path).expanduser()
    content, overrides = _joined(file, _read(file), overrides)
    given = parse_overrides(overrides)
    content = merged(content, {"measure": given.pop("measure")} if "measure" in given else {})
    parts = _Parts(file, content, flat(given))
    runs = _build_runs(parts)
    if parts.problems:
        raise _unusable(file, *parts.problems)
    axes = {axis: list({_text(run.settings[axis]): run.settings[axis] for run in runs}.values()) for axis in parts.axes}
    folder = Path(runs[0].config.runs_dir)
    return Sweep(parts.name, folder, axes, parts.keys, runs, write_yaml(parts.content()), parts.measure, parts.studies)


def _joined(file: Path, content: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Sequence[str]]:
    """A file that names other sweep files as one with their runs, which says whose they are; overrides of the whole."""
    named = content.get("studies")
    if isinstance(named, dict | None):  # with a dictionary a joint sweep that was written down
        return content, overrides
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise _unusable(file, f"studies: expected a list of sweep files (got {named!r:.60})")
    files = [file.parent / name for name in named]
    content = combine([load_sweep(path, fitting(_read(path), overrides)) for path in files], content)
    return content, [text for text in overrides if text.partition("=")[0] in PLACE]


class _Parts:
    """The parts of a sweep file, checked for shape; what is wrong is in `problems`."""

    def __init__(self, file: Path, content: dict[str, Any], given: dict[str, Any]) -> None:
        self.file = file
        self.problems = [_unknown(key) for key in content if key not in KEYS]
        self.settings = self._read_base(content.get("base", "recommended"))
        own = flat(self._mapping(content, "settings"))
        if "name" in own:
            self.problems.append("settings.name: a run gets its name from the sweep, whose own stands at the top")
        self.name = str(given.pop("name", content.get("name", file.stem)))
        if not NAME.fullmatch(self.name):
            self.problems.append(f"name: expected {LETTERS} (got {self.name!r})")
        axes = {key: self._axis(key, values) for key, values in flat(self._mapping(content, "grid")).items()}
        self.grid = {key: values for key, values in axes.items() if values}
        self.sets = self._read_runs(content.get("runs"))
        if not content.get("grid") and not content.get("runs"):
            self.problems.append("nothing to run: give grid (key: [values]) or runs (a list of named settings)")
        self.axes = ([RUN] if self.sets else []) + list(self.grid)
        self.keys = list(dict.fromkeys([*(key for chosen in self.sets.values() for key in chosen), *self.grid]))
        self._check_overlaps(given)
        self.settings |= own | given
        self.settings.setdefault(CONTROLS_KEY, UNTRAINED)
        self.measure = read_measure(content.get("measure"), self.problems)
        self.studies: Studies = content.get("studies") or {}

    def content(self) -> dict[str, Any]:
        """The sweep file without its base, which has become settings."""
        sets = [{"name": name, **chosen} for name, chosen in self.sets.items()]
        measure = self.measure.model_dump(mode="json") if self.measure.anything else {}
        parts = {"grid": self.grid, "runs": sets, "measure": measure, "studies": self.studies}
        filled = {key: part for key, part in parts.items() if part}
        return {"name": self.name, "base": None, "settings": self.settings, **filled}

    def _read_base(self, base: object) -> dict[str, Any]:
        """All settings of the base but its name; a control as dear as stage 2 is for those who ask the sweep for it."""
        if base is not None and not isinstance(base, str):
            self.problems.append(f"base: expected a recipe, a YAML file or null (got {base!r})")
            return {}
        if base is None:
            return {}
        # A file is looked for beside the sweep file, so that the two can be moved together.
        is_file = base.endswith((".yaml", ".yml"))
        config = load_config(self.file.parent / str(base) if is_file else base)
        own = {key: value for key, value in flat(read_yaml(dump_config(config))).items() if key != "name"}
        return own | {CONTROLS_KEY: [name for name in own[CONTROLS_KEY] if name in UNTRAINED]}

    def _mapping(self, content: dict[str, Any], key: str) -> dict[str, Any]:
        value = content.get(key)
        if isinstance(value, dict | None):
            return value or {}
        self.problems.append(f"{key}: expected `key: value` lines (got {value!r:.60})")
        return {}

    def _axis(self, key: str, values: object) -> list[Any]:
        if values == []:
            self.problems.append(f"grid.{key}: no values; give at least one, or leave the key out")
        elif not isinstance(values, list):
            self.problems.append(f"grid.{key}: expected a list of values (got {values!r:.60}); one value: [{values}]")
        return values if isinstance(values, list) else []

    def _read_runs(self, runs: object) -> dict[str, dict[str, Any]]:
        """Name -> settings."""
        if not isinstance(runs, list | None):
            self.problems.append(f"runs: expected a list of settings, each with a name (got {runs!r:.60})")
            return {}
        sets: dict[str, dict[str, Any]] = {}
        for number, item in enumerate(runs or [], start=1):
            name = item.get("name") if isinstance(item, dict) else None
            if name is None or not NAME.fullmatch(str(name)):
                what = "and settings" if name is None else f"of {LETTERS}"
                self.problems.append(f"runs, item {number}: expected a name {what} (got {item!r:.80})")
            elif str(name) in sets:
                self.problems.append(f"runs, item {number}: the name {name} is taken; each run needs its own")
            else:
                sets[str(name)] = flat({key: value for key, value in item.items() if key != "name"})
        return sets

    def _check_overlaps(self, given: dict[str, Any]) -> None:
        listed = {key for chosen in self.sets.values() for key in chosen}
        for key in self.keys:
            if key in ("name", "runs_dir"):
                self.problems.append(f"{key}: cannot be swept; folders are named by the sweep")
            if key in self.grid and key in listed:
                self.problems.append(f"{key}: is in grid and in runs; a key can be swept in one of them")
            if key in given:
                self.problems.append(f"override {key}: the sweep itself sets this key; change it in the file")


def _build_runs(parts: _Parts) -> list[SweepRun]:
    """All runs whose settings can be used; the problems of the others go to those of the file."""
    sizes = [len(part) for part in [parts.sets, *parts.grid.values()] if part]
    if (count := math.prod(sizes)) > MAX_RUNS:
        product = " x ".join(map(str, sizes))
        parts.problems.append(f"{product} = {count:,} runs; a sweep has at most {MAX_RUNS}: split it")
        return []
    runs: list[SweepRun] = []
    problems: dict[str, list[str]] = {}
    sets: list[tuple[str | None, dict[str, Any]]] = [*parts.sets.items()] or [(None, {})]
    for (name, chosen), values in itertools.product(sets, itertools.product(*parts.grid.values())):
        point = dict(zip(parts.grid, values, strict=True))
        settings = parts.settings | chosen | point
        try:
            config = load_config(None, [f"{key}={_text(value)}" for key, value in settings.items()])
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                problems.setdefault(line.strip(), []).append(_run_name(name, point))
            continue
        read = {key: _value(config, key) for key in parts.keys}  # 1e6 has become 1000000
        config.name = _run_name(name, {key: read[key] for key in point})
        config.runs_dir = str(Path(config.runs_dir) / parts.name)
        runs.append(SweepRun(config.name, config, ({} if name is None else {RUN: name}) | read, parts.measure))
    _share_local(runs)
    names = [run.name for run in runs]
    parts.problems += [line + _where(bad, count) for line, bad in problems.items()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        parts.problems.append(f"two runs are called {name}: values that look the same; name them in runs")
    if parts.measure.teacher and parts.measure.anything and "teacher" in names:
        parts.problems.append("a run cannot be called teacher: the table has a row of that name; give it another one")
    return runs


def _value(config: RunConfig, key: str) -> Any:
    """What a configuration has at a dotted key, as YAML and JSON spell it."""
    return functools.reduce(lambda section, part: section[part], key.split("."), config.model_dump(mode="json"))


def _run_name(name: str | None, point: dict[str, Any]) -> str:
    """The name of a run, and of its folder: that of its set of settings, and the values of the axes."""
    last = [key.rpartition(".")[2] for key in point]
    words = [] if name is None else [name]
    for key, short in zip(point, last, strict=True):
        words.append(f"{short if last.count(short) == 1 else key}-{label(point[key])}")
    return "_".join(words) or "run"  # without an axis the file is refused anyway


def _share_local(runs: Sequence[SweepRun]) -> None:
    """Copies of data sets that only other runs read are no matter of a run, which would refuse them as strays."""
    used = [local_names([*run.config.data.source_names, *run.config.evaluation.sources]) for run in runs]
    for run, own in zip(runs, used, strict=True):
        foreign = set().union(*used) - own
        run.config.data.local = {name: copy for name, copy in run.config.data.local.items() if name not in foreign}


def _where(names: list[str], count: int) -> str:
    """Which of `count` runs a problem is of, if not of all."""
    more = f" and {len(names) - 2} others" if len(names) > 3 else ""
    return "" if len(names) == count else f" (in {', '.join(names[:2] if more else names)}{more})"


def _unknown(key: str) -> str:
    keys = flat(RunConfig().model_dump()).keys() | RunConfig.model_fields.keys()
    near = difflib.get_close_matches(str(key), KEYS, 1, 0.7)
    if not near and (key in keys or str(key).split(".")[0] in RunConfig.model_fields):
        return f"{key}: is a key of a run; put it under settings"
    return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"expected {', '.join(KEYS)}")


def _unusable(file: Path, *problems: str) -> ConfigError:
    return ConfigError(f"the sweep {file} cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"no sweep file {file}; expected a YAML file with base, settings, grid and runs")
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the sweep {file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"the sweep {file} must hold base, settings, grid and runs; got {content!r:.60}")
    return content


def _text(value: Any) -> str:
    """A value as YAML on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)
