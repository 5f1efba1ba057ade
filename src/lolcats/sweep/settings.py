"""The sweep file: base settings, a grid over keys of a configuration, and named sets of settings.

The runs are every one of `runs` at every point of `grid`. Unknown keys, wrong values, and runs of one name are errors,
collected into one message.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lolcats.config import RunConfig, dump_config, load_config, merged, parse_overrides
from lolcats.config.strict_yaml import read_yaml, write_yaml
from lolcats.data import local_names
from lolcats.errors import ConfigError
from lolcats.sweep.measure import MeasureConfig, read_measure
from lolcats.sweep.naming import NAME, run_name
from lolcats.sweep.studies import PLACE, Studies, combine, fitting, flat

MAX_RUNS = 256
"""Most runs of one sweep: a grid grows faster than one thinks."""
RUN = "run"
"""Name of the axis that `runs` makes."""
KEYS = ("name", "base", "settings", "grid", "runs", "measure", "studies")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """Also of its folder inside the sweep's."""
    config: RunConfig
    point: dict[str, Any]
    """Axis -> the value that this run has there; the axis `run` holds the name of its set of settings."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """What is measured of the finished student; the same for all runs of a sweep."""

    def value(self, key: str) -> Any:
        """The value of a key of the configuration, such as finetune.rank; of the axis `run` its name."""
        return self.point[RUN] if key == RUN else read_key(self.config, key)


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file says."""

    name: str
    folder: Path
    axes: dict[str, list[Any]]
    """Axis -> its values, in the order of the file."""
    keys: list[str]
    """Keys of the configuration in which runs differ, in the order of the file; `run` is not among them."""
    runs: list[SweepRun]
    text: str
    """The sweep as YAML that needs no other file and no overrides."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    studies: Studies = field(default_factory=dict)
    """Of a sweep that joins others: study -> name of a run in it -> name of the run here."""


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
    content, overrides, studies = _joined(file, _read(file), overrides)
    given = parse_overrides(overrides)
    content = merged(content, {"measure": given.pop("measure")} if "measure" in given else {})
    parts = _Parts(file, content, flat(given))
    runs = [] if parts.too_many else _build_runs(parts)
    if parts.problems:
        lines = "\n".join(f"  {problem}" for problem in parts.problems)
        raise ConfigError(f"the sweep {file} cannot be used:\n{lines}")
    axes = {axis: list({_text(run.point[axis]): run.point[axis] for run in runs}.values()) for axis in parts.axes()}
    text = _resolved(parts, studies)
    return Sweep(parts.name, Path(runs[0].config.runs_dir), axes, parts.keys(), runs, text, parts.measure, studies)


def _joined(
    file: Path, content: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], Sequence[str], Studies]:
    """A file that names other sweep files as one that has their runs, the overrides of the whole, and what is whose."""
    named = content.pop("studies", None)
    if isinstance(named, dict):  # a joint sweep that was written down
        return content, overrides, named
    if named is None:
        return content, overrides, {}
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise ConfigError(
            f"the sweep {file} cannot be used:\n  studies: expected a list of sweep files (got {named!r:.60})"
        )
    files = [file.parent / name for name in named]
    content, studies = combine([load_sweep(path, fitting(_read(path), overrides)) for path in files], content)
    return content, [text for text in overrides if text.partition("=")[0] in PLACE], studies


def read_key(config: RunConfig, key: str) -> Any:
    """The value at a dotted key, as YAML and JSON have it."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


class _Parts:
    """The parts of a sweep file, checked for shape; what is wrong is in `problems`."""

    def __init__(self, file: Path, content: dict[str, Any], given: dict[str, Any]) -> None:
        self.file = file
        self.problems = [_unknown(key) for key in content if key not in KEYS]
        self.base_settings = self._read_base(content.get("base", "recommended"))
        self.settings = flat(self._mapping(content, "settings"))
        if "name" in self.settings:
            self.problems.append("settings.name: a run gets its name from the sweep, whose own stands at the top")
        self.name = str(given.pop("name", content.get("name", file.stem)))
        if not NAME.fullmatch(self.name):
            self.problems.append(f"name: expected letters, digits, '.', '_' and '-' (got {self.name!r})")
        axes = {key: self._axis(key, values) for key, values in flat(self._mapping(content, "grid")).items()}
        self.grid = {key: values for key, values in axes.items() if values}
        self.sets = self._read_runs(content.get("runs"))
        if not content.get("grid") and not content.get("runs"):
            self.problems.append("nothing to run: give grid (key: [values]) or runs (a list of named settings)")
        self._check_overlaps(given)
        self.settings |= given
        self.measure = read_measure(content.get("measure"), self.problems)
        self.too_many = self._check_size()

    def axes(self) -> list[str]:
        """Names of the axes."""
        return ([RUN] if self.sets else []) + list(self.grid)

    def keys(self) -> list[str]:
        """Keys of the configuration that `runs` and `grid` set."""
        return list(dict.fromkeys([*(key for _, chosen in self.sets for key in chosen), *self.grid]))

    def points(self) -> Iterator[tuple[str | None, dict[str, Any], dict[str, Any]]]:
        """(name of the set of settings, settings of it, settings of the grid) of each run."""
        for name, chosen in self.sets or [(None, {})]:
            for values in itertools.product(*self.grid.values()):
                yield name, chosen, dict(zip(self.grid, values, strict=True))

    def _read_base(self, base: object) -> dict[str, Any]:
        """All settings of the base but its name."""
        if base is not None and not isinstance(base, str):
            self.problems.append(f"base: expected a recipe, a YAML file or null (got {base!r})")
            return {}
        # A file is looked for beside the sweep file, so that the two can be moved together.
        is_file = base is not None and base.endswith((".yaml", ".yml"))
        config = load_config(self.file.parent / str(base) if is_file else base)
        return {key: value for key, value in flat(read_yaml(dump_config(config))).items() if key != "name"}

    def _mapping(self, content: dict[str, Any], key: str) -> dict[str, Any]:
        value = content.get(key)
        if isinstance(value, dict | None):
            return value or {}
        self.problems.append(f"{key}: expected `key: value` lines (got {value!r:.60})")
        return {}

    def _axis(self, key: str, values: object) -> list[Any]:
        if not isinstance(values, list):
            self.problems.append(f"grid.{key}: expected a list of values (got {values!r:.60}); one value: [{values}]")
        elif not values:
            self.problems.append(f"grid.{key}: no values; give at least one, or leave the key out")
        else:
            return values
        return []

    def _read_runs(self, runs: object) -> list[tuple[str, dict[str, Any]]]:
        if not isinstance(runs, list | None):
            self.problems.append(f"runs: expected a list of settings, each with a name (got {runs!r:.60})")
            return []
        sets: list[tuple[str, dict[str, Any]]] = []
        for number, item in enumerate(runs or [], start=1):
            name = item.get("name") if isinstance(item, dict) else None
            if name is None or not NAME.fullmatch(str(name)):
                what = "of letters, digits, '.', '_' and '-'" if name is not None else "and settings"
                self.problems.append(f"runs, item {number}: expected a name {what} (got {item!r:.80})")
            elif name in [other for other, _ in sets]:
                self.problems.append(f"runs, item {number}: the name {name} is taken; each run needs its own")
            else:
                sets.append((str(name), flat({key: value for key, value in item.items() if key != "name"})))
        return sets

    def _check_overlaps(self, given: dict[str, Any]) -> None:
        for key in {"name", "runs_dir"} & set(self.keys()):
            self.problems.append(f"{key}: cannot be swept; folders are named by the sweep")
        listed = {key for _, chosen in self.sets for key in chosen}
        for key in [key for key in self.grid if key in listed]:
            self.problems.append(f"{key}: is in grid and in runs; a key can be swept in one of them")
        for key in [key for key in given if key in self.keys()]:
            self.problems.append(f"override {key}: the sweep itself sets this key; change it in the file")

    def _check_size(self) -> bool:
        sizes = [len(self.sets)] * bool(self.sets) + [len(values) for values in self.grid.values()]
        count = 1
        for size in sizes:
            count *= size
        if count > MAX_RUNS:
            product = " x ".join(map(str, sizes))
            self.problems.append(f"{product} = {count:,} runs; a sweep has at most {MAX_RUNS}: split it")
        return count > MAX_RUNS


def _build_runs(parts: _Parts) -> list[SweepRun]:
    """All runs whose settings can be used; the problems of the others go to those of the file."""
    runs: list[SweepRun] = []
    problems: dict[str, list[str]] = {}
    count = 0
    for name, chosen, point in parts.points():
        count += 1
        settings = parts.base_settings | parts.settings | chosen | point
        try:
            config = load_config(None, [f"{key}={_text(value)}" for key, value in settings.items()])
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                problems.setdefault(line.strip(), []).append(run_name(name, point))
            continue
        point = {key: read_key(config, key) for key in point}  # 1e6 has become 1000000
        config.name = run_name(name, point)
        config.runs_dir = str(Path(config.runs_dir) / parts.name)
        runs.append(SweepRun(config.name, config, ({} if name is None else {RUN: name}) | point, parts.measure))
    _share_local(runs)
    for name in sorted({run.name for run in runs if [other.name for other in runs].count(run.name) > 1}):
        problems[f"two runs are called {name}: values that look the same; name them in runs"] = []
    if parts.measure.teacher and parts.measure.anything and "teacher" in [run.name for run in runs]:
        problems["a run cannot be called teacher: the table has a row of that name; give it another one"] = []
    parts.problems += [_at(line, names, count) for line, names in problems.items()]
    return runs


def _share_local(runs: Sequence[SweepRun]) -> None:
    """Copies of data sets that only other runs read are no matter of a run, which would refuse them as strays."""
    used = [local_names([*run.config.data.source_names, *run.config.evaluation.sources]) for run in runs]
    for run, own in zip(runs, used, strict=True):
        foreign = set().union(*used) - own
        run.config.data.local = {name: copy for name, copy in run.config.data.local.items() if name not in foreign}


def _at(line: str, names: list[str], count: int) -> str:
    if not names or len(names) == count:
        return line
    more = f" and {len(names) - 2} others" if len(names) > 3 else ""
    return f"{line} (in {', '.join(names[:2] if more else names)}{more})"


def _unknown(key: str) -> str:
    keys = flat(RunConfig().model_dump()).keys() | RunConfig.model_fields.keys()
    near = difflib.get_close_matches(str(key), KEYS, 1, 0.7)
    if not near and (key in keys or str(key).split(".")[0] in RunConfig.model_fields):
        return f"{key}: is a key of a run; put it under settings"
    return f"{key}: unknown key; did you mean {near[0]}?" if near else f"{key}: unknown key; expected {', '.join(KEYS)}"


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


def _resolved(parts: _Parts, studies: Studies) -> str:
    """The sweep file without its base, which becomes settings."""
    settings = parts.base_settings | parts.settings
    content: dict[str, Any] = {"name": parts.name, "base": None, "settings": settings}
    if parts.grid:
        content["grid"] = parts.grid
    if parts.sets:
        content["runs"] = [{"name": name, **chosen} for name, chosen in parts.sets]
    if parts.measure.anything:
        content["measure"] = parts.measure.model_dump(mode="json")
    if studies:
        content["studies"] = studies
    return write_yaml(content)
