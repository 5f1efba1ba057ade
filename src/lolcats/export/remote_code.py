"""The code beside the weights, for those who do not have this package.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` copies the module named in `auto_map` and what it
imports relatively, as flat files. So each module of the package that a linearized model needs becomes one file, its own
source with the imports made relative. Only the settings are another class: the package's check what users write with
pydantic, which a model that is merely loaded does not need.

The Triton kernels are among the files. transformers asks for every package that a file imports, unless it does so in a
`try`; so Triton's imports are put into one, and the model is loaded, and runs in plain PyTorch, where there is none.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lolcats.config.mixers import DEFAULT
from lolcats.config.mixers import MIXERS as SETTINGS_OF
from lolcats.errors import LolcatsError
from lolcats.mixers.registry import MIXERS, build_mixer
from lolcats.modeling.hf import linearized_config_class
from lolcats.version import __version__

START, SETTINGS, ENTRY = "lolcats.modeling.hf", "lolcats.config", "modeling_lolcats"
REGISTRY = build_mixer.__module__
IMPORT = re.compile(r"^(\s*)from (lolcats(?:\.\w+)*) import ", re.MULTILINE)
REGISTRATION = "AutoConfig.register(MODEL_TYPE, LolcatsConfig, exist_ok=True)\n"
HOOK_NAME = 'NAME = "lolcats"\n'
STAND_INS = {"LinearizationConfig", "check_linearization"}
"""What modules may import of the settings."""
NAMED_MODULE = re.compile(r"lolcats(\.\w*)+")
"""A text that names a module, or the beginning of such a text."""
TRITON = re.compile(r"(?:^import triton\b.*\n)+", re.MULTILINE)
"""The lines by which a file of kernels imports Triton."""
HEADER = "# Written by `lolcats export` from the sources of lolcats {version}, Apache License 2.0.\n"


def write_code(folder: Path) -> None:
    """Put the code into a model's folder and name it in its config.json.

    Raises:
        LolcatsError: config.json names a family that transformers does not know.
    """
    config = json.loads((folder / "config.json").read_text())
    family = config.get("base_model_type")
    if family not in CONFIG_MAPPING:
        raise LolcatsError(f"{folder / 'config.json'} has base_model_type {family!r}, which transformers does not know")
    config_type = linearized_config_class(CONFIG_MAPPING[family])
    model_type = cast(type, AutoModelForCausalLM._model_mapping[config_type])
    # Not what config.json calls them: that would be text from a file in code that somebody runs.
    config_class, model_class = config_type.__name__, model_type.__name__
    files = collect_sources(config["linearization"].get("mixer", DEFAULT))
    files[ENTRY] = _entry_source(family, config_class, model_class)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(HEADER.format(version=__version__) + text, encoding="utf-8")
    config["auto_map"] = {
        "AutoConfig": f"{ENTRY}.{config_class}",
        "AutoModelForCausalLM": f"{ENTRY}.{model_class}",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def collect_sources(mixer: str = DEFAULT) -> dict[str, str]:
    """Flat module name -> source, of every module that a model of this mixer imports, when built or at any call later.

    Two are written for the mixer: its settings, and a registry that knows no other.
    """
    written = {SETTINGS: settings_source(mixer), REGISTRY: registry_source(mixer)}
    found: dict[str, str] = {}
    waiting = [START]
    while waiting:
        module = waiting.pop()
        if flat_name(module) in found:
            continue
        text = written.get(module) or _read_source(module)
        waiting += [match[2] for match in IMPORT.finditer(text)]
        text = IMPORT.sub(lambda match: f"{match[1]}from .{flat_name(match[2])} import ", text)
        found[flat_name(module)] = TRITON.sub(_tried, text)
    return _stand_alone(found)


def flat_name(module: str) -> str:
    """`lolcats.ops.types` -> `lolcats_ops_types`."""
    return module.replace(".", "_")


def registry_source(mixer: str) -> str:
    """`lolcats.mixers.registry` with one mixer."""
    kind = MIXERS[mixer]
    return (
        f'"""The mixer of this model."""\n\nfrom typing import Any\n\nfrom lolcats.mixers.base import Mixer, Sizes\n'
        f"from {kind.__module__} import {kind.__name__}\n\nMIXERS = {{{mixer!r}: {kind.__name__}}}\n\n\n"
        + inspect.getsource(build_mixer)
    )


def _default(info: FieldInfo) -> str:
    """The default of a setting as code."""
    value = info.get_default(call_default_factory=True)
    value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return f"field(default_factory=lambda: {value!r})" if isinstance(value, dict | list) else repr(value)


def settings_source(mixer: str) -> str:
    """The names of `STAND_INS`: a plain class with the fields and defaults of the mixer's settings."""
    kind = SETTINGS_OF[mixer]
    fields = "".join(f"    {name}: Any = {_default(info)}\n" for name, info in kind.model_fields.items())
    return f'''"""The settings of linearized layers, as config.json holds them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LinearizationConfig:
{fields}
    def model_dump(self, mode: str = "json") -> dict[str, Any]:
        return asdict(self)

    def values(self, place: int = 0) -> dict[str, Any]:
        values = {{name: value for name, value in asdict(self).items() if name not in {sorted(kind.around)}}}
        return values | {{name: values[name][place] for name in {sorted(kind.by_layer)} if values[name] is not None}}


def check_linearization(settings: Any, source: str = "config.json") -> LinearizationConfig:
    try:
        return LinearizationConfig(**settings)
    except TypeError as error:
        raise ValueError(f"{{source}} cannot be used: linearization: {{error}}") from error
'''


def _read_source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    text = Path(spec.origin).read_text(encoding="utf-8")
    check_imports(module, text)
    return text


def check_imports(module: str, text: str) -> None:
    """Assert that a module's imports can be followed: all by `from lolcats.MODULE import NAME`, none by a text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            plain = any(alias.name.split(".")[0] == "lolcats" for alias in node.names)
            assert not plain, f"{module} must import from the package by `from lolcats... import`"
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            assert node.level == 0, f"{module} must not import relatively"
            assert node.module != SETTINGS or names <= STAND_INS, f"{module} imports {names} from {SETTINGS}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not NAMED_MODULE.fullmatch(node.value), f"{module} has {node.value!r}: imported by its name?"


def _tried(match: re.Match[str]) -> str:
    lines = "".join(f"    {line}\n" for line in match[0].splitlines())
    return f"try:\n{lines}except ImportError:\n    raise\n"


def _stand_alone(files: dict[str, str]) -> dict[str, str]:
    """Keep the code of each folder to itself: several models, of several versions, may be in one process."""
    edits = {
        "lolcats_modeling_hf": (REGISTRATION, ""),
        "lolcats_modeling_masks": (HOOK_NAME, "NAME = __name__\n"),
    }
    for name, (old, new) in edits.items():
        assert files[name].count(old) == 1, f"{name} has no line {old!r}"
        files[name] = files[name].replace(old, new)
    return files


def _entry_source(family: str, config_class: str, model_class: str) -> str:
    return f'''"""What config.json names: the classes of this linearized model."""

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .{flat_name(START)} import linearized_config_class

{config_class} = linearized_config_class(CONFIG_MAPPING["{family}"])
{model_class} = AutoModelForCausalLM._model_mapping[{config_class}]
for made in ({config_class}, {model_class}):
    made.__module__ = __name__  # save_pretrained copies the file of this module and those it imports
{config_class}.register_for_auto_class("AutoConfig")
{model_class}.register_for_auto_class("AutoModelForCausalLM")
'''
