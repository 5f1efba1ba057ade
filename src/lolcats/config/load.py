"""Settings from YAML, shipped recipes and `key.sub=value` overrides, with errors that explain themselves."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lolcats.config.data import SourceConfig
from lolcats.config.mixers import MIXERS, LinearizationConfig, mixer_settings
from lolcats.config.run import RunConfig
from lolcats.config.strict_yaml import read_yaml, write_yaml
from lolcats.errors import ConfigError
from lolcats.printable import MOST_PROBLEMS, shorten

LAYER = "linearization"
"""The section that says what the layers are."""


def load_config(path_or_recipe: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Build the settings of a run from a file or a shipped recipe, then apply overrides.

    A file may be `base: NAME`, a recipe or another YAML file beside it, and what it changes in that.

    Args:
        path_or_recipe: a YAML file; the name of a shipped recipe ("recommended", "small", "recall", "hybrid", "paper"),
            which wins over a file of that name; or None for the defaults alone.
        overrides: `key.sub=value` texts, see `parse_overrides`. A later one wins.

    Raises:
        ConfigError: no such file or recipe, broken YAML, or wrong settings; all of these in one message, a line each.
    """
    settings = {} if path_or_recipe is None else _read_settings(path_or_recipe)
    try:
        settings = merged(settings, parse_overrides(overrides))
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        valid = [key for key in dotted(RunConfig().model_dump()) if not key.startswith(f"{LAYER}.")]
        valid += _layer_keys(settings.get(LAYER)) + [f"data.sources.{k}" for k in SourceConfig.model_fields]
        lines = "\n".join(f"  {line}" for line in explain(error, valid))
        raise ConfigError(f"the configuration {path_or_recipe or 'given'} cannot be used:\n{lines}") from error


def check_linearization(settings: object, source: str = "config.json") -> LinearizationConfig:
    """The layer that a linearized model's configuration describes.

    Raises:
        ConfigError: settings that cannot be used; the message names them.
    """
    try:
        return RunConfig.model_validate({"linearization": settings}).linearization
    except ValidationError as error:
        lines = "; ".join(explain(error, ["linearization", *_layer_keys(settings)]))
        raise ConfigError(f"{source} cannot be used: {lines}") from error


def _layer_keys(settings: object) -> list[str]:
    """The keys that a section `linearization` may have, which depend on its mixer."""
    return [f"{LAYER}.{key}" for key in dotted(mixer_settings(settings)().model_dump())]


def dump_config(config: RunConfig) -> str:
    """Write every setting as YAML that `load_config` reads back to an equal `RunConfig`."""
    return write_yaml(config.model_dump(mode="json"))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn `["finetune.lr=1e-4", "name=try"]` into `{"finetune": {"lr": 1e-4}, "name": "try"}`; values are YAML.

    Raises:
        ConfigError: texts that are not `key=value` with a dotted key and a YAML value; all of them, a line each.
    """
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            problems.append(f"override {override!r}: expected key=value, such as finetune.lr=1e-4")
            continue
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            problems.append(f"override {override!r}: the part after = is not valid YAML; quote it if it is text")
            continue
        for part in reversed(key.split(".")):
            value = {part.strip(): value}
        settings = merged(settings, value)
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def merged(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `new`, section by section; of a layer that `new` replaces by another little is left."""
    if mixer_settings(base.get(LAYER)) is not mixer_settings({**_section(base), **_section(new)}):
        base = base | {LAYER: {key: value for key, value in _section(base).items() if key in ("layers", "impl")}}
    nested = [key for key in new if isinstance(new[key], dict) and isinstance(base.get(key), dict)]
    return base | new | {key: merged(base[key], new[key]) for key in nested}


def _section(settings: dict[str, Any]) -> dict[str, Any]:
    section = settings.get(LAYER)
    return section if isinstance(section, dict) else {}


def _read_settings(path_or_recipe: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, on top of its base; `above` are the files of which it is the base."""
    shipped = (resources.files("lolcats") / "recipes").iterdir()
    recipes = {item.name.removesuffix(".yaml"): item for item in shipped if item.name.endswith(".yaml")}
    file = recipes.get(str(path_or_recipe)) or Path(path_or_recipe).expanduser()
    if not file.is_file():
        names = ", ".join(sorted(recipes))
        raise ConfigError(f"no configuration file {path_or_recipe}; give a YAML file or a shipped recipe: {names}")
    try:
        settings = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path_or_recipe}: {error}") from error
    if not isinstance(settings, dict | None):
        raise ConfigError(f"the configuration {path_or_recipe} must hold `key: value` lines, got {settings!r:.60}")
    settings = settings or {}
    if (base := settings.pop("base", None)) is None:
        return settings
    if not isinstance(base, str):
        raise ConfigError(f"{path_or_recipe}: base: expected a recipe or a YAML file (got {base!r:.60})")
    place = Path(str(file)).resolve()
    if place in above:
        raise ConfigError(f"{path_or_recipe}: base: it is the base of itself; name another one, or none")
    below = base if base in recipes else place.parent / Path(base).expanduser()
    return merged(_read_settings(below, (*above, place)), settings)


def dotted(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """All keys of nested settings, such as finetune and finetune.lr."""
    inner = {prefix + key: value for key, value in settings.items() if isinstance(value, dict)}
    return [prefix + key for key in settings] + [key for name in inner for key in dotted(inner[name], name + ".")]


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


def _likeness(key: str, other: str) -> float:
    # The last part counts again by itself: `windw` is near linearization.window although its section is missing.
    pairs = [(key, other), (key.rpartition(".")[2], other.rpartition(".")[2])]
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)


def _without_kinds(location: tuple[int | str, ...]) -> list[int | str]:
    """A location without the names of the classes that the union's parts are read by."""
    last = ("", *location)
    return [
        part for part, before in zip(location, last, strict=False)
        if part != "SourceConfig" and not (before == "linearization" and part in MIXERS)
    ]  # fmt: skip


def explain(error: ValidationError, valid: Sequence[str]) -> list[str]:
    """What is wrong with settings, a line for each key; `valid` are all keys that there are."""
    names = {part for key in valid for part in key.split(".")}
    problems: dict[str, list[str]] = {}
    items = error.errors(include_url=False)
    for item in items[:MOST_PROBLEMS]:
        if item["loc"][-1:] == ("str",) and isinstance(item["input"], dict):
            continue  # a source with settings is no plain name: what is wrong inside it is said below
        if item["type"] == "extra_forbidden":
            path = ".".join(str(part) for part in _without_kinds(item["loc"]))
            problems[path] = [f"unknown key; did you mean {max(valid, key=partial(_likeness, path))}?"]
            continue
        if item["type"] == "unknown_mixer":
            problems[".".join(map(str, item["loc"])) + ".mixer"] = [
                f"{item['msg']} (got {item['input']['mixer']!r:.60})"
            ]
            continue
        # A union adds the name of each of its types to the location; joined under the key they read as one sentence.
        path = ".".join(str(part) for part in item["loc"] if isinstance(part, int) or part in names)
        message = item["msg"].removeprefix("Value error, ")
        got = "" if isinstance(item["input"], dict | BaseModel) else f" (got {shorten(repr(item['input']), 100)})"
        problems.setdefault(path, []).append(message + got)
    more = [f"and {len(items) - MOST_PROBLEMS:,} more"] if len(items) > MOST_PROBLEMS else []
    return [f"{path}: {' or '.join(messages)}" if path else messages[0] for path, messages in problems.items()] + more
