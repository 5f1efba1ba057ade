"""The settings of a run: pydantic models, strict YAML, and `key.sub=value` overrides.

Unknown keys and wrong types are errors. `configs/smollm2_135m.yaml` in the repository explains every key.
"""

import difflib
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from lolcats.errors import ConfigError
from lolcats.printable import shorten
from lolcats.settings import Count, Factor, Length, Names, Near, Positive, Rate, Rows, Section, Seed, Tokens, Width
from lolcats.settings import DataConfig as DataConfig
from lolcats.settings import SourceConfig as SourceConfig
from lolcats.strict_yaml import read_yaml, write_yaml

MOST_PROBLEMS = 20
"""Wrong settings that a message explains."""
Control = Literal["window_only", "linear_only", "no_attention", "training_free"]


class LinearizationConfig(Section):
    """The attention layer that replaces softmax attention, and the layers that get it."""

    feature_map: Literal["hedgehog", "t2r", "elu", "relu", "exp_dim"] = "hedgehog"
    feature_size: Width | None = None  # f, the width of the learned matrix; None is the head size
    window: Near = 64  # tokens with exact softmax attention
    window_kind: Literal["sliding", "terraced"] = "sliding"
    sinks: Near = 0  # first tokens of the text that always keep softmax attention
    state_heads: Literal["query", "kv"] = "query"  # one linear state per query head, or one per key/value head
    layers: Literal["all"] | list[int] | float = "all"  # indices (negative from the end), or a fraction in (0, 1]
    impl: Literal["auto", "triton", "chunked", "recurrent", "reference"] = "auto"
    start: Literal["paper", "matched"] = "paper"
    decay: Literal["none", "gate"] = "none"  # gate: a learned, data-dependent scalar decay a head

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: object) -> object:
        value = list(value) if isinstance(value, tuple | range) else value
        if value == "all" or (isinstance(value, float) and 0 < value <= 1):
            return value
        # A bare 1 could mean "all of them" or "layer 1", so whole numbers are only taken inside a list.
        if not isinstance(value, list) or any(type(index) is not int for index in value):
            raise ValueError('expected "all", a list of layer indices, or a fraction above 0 and up to 1.0')
        if not value or len(set(value)) < len(value):
            raise ValueError("a list of layers needs at least one index, and each index once")
        return value

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.window_kind == "terraced" and self.window == 0:
            raise ValueError("a terraced window needs window >= 1; for no window use window_kind sliding")
        return self


class OptimConfig(Section):
    """The optimiser settings that both stages share."""

    _losses: ClassVar[tuple[str, ...]] = ()  # the weights of the stage's losses
    enabled: bool = True
    tokens: Tokens  # training tokens of the stage; see `steps`
    batch_size: Rows = 8  # sequences a step
    micro_batch_size: Rows | None = None  # sequences at once on the device; None is batch_size
    lr: Rate
    schedule: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of lr left at the end of cosine and linear
    warmup_steps: Count = 20
    weight_decay: Factor = 0.0
    clip: Rate = 1.0  # largest norm of the gradient
    validate_every: Positive = 100  # steps
    checkpoint_every: Positive = 100  # steps
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # plateau multiplies lr by this ...
    plateau_patience: Count = 2  # ... after this many validations without a gain
    compile: Literal["auto"] | bool = "auto"
    cuda_graph: bool = True  # on CUDA devices, record a step once and replay it

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        if self._losses and not any(getattr(self, name) for name in self._losses):
            raise ValueError(f"{' and '.join(self._losses)} are both 0; set at least one above 0")
        return self

    def steps(self, sequence_length: int) -> int:
        """Count the optimiser steps that read `tokens` tokens in sequences of `sequence_length`, rounded up."""
        return -(-self.tokens // (self.batch_size * sequence_length))


class TransferConfig(OptimConfig):
    """Stage 1, attention transfer: each layer learns to give the output of its own softmax attention."""

    _losses = ("mse_factor", "xent_factor")
    tokens: Tokens = 10_000_000
    lr: Rate = 1e-2
    mse_factor: Factor = 1000.0  # weight of the error of head outputs
    xent_factor: Factor = 0.0  # weight of the cross-entropy between attention weights (memory grows with length^2)
    target: Literal["hybrid", "linear"] = "hybrid"  # which output is compared: with the window, or the linear half


class FinetuneConfig(OptimConfig):
    """Stage 2: the linearized model learns to predict text, by LoRA or with all weights."""

    _losses = ("cross_entropy_factor", "kl_factor")
    tokens: Tokens = 10_000_000
    lr: Rate = 1e-4
    method: Literal["lora", "full"] = "lora"
    rank: Width = 8
    alpha: Rate = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["attention", "all"] | Names = "attention"  # linear layers in linearized attention, all, or names
    train_feature_maps: bool = False
    cross_entropy_factor: Factor = 1.0  # weight of next-token cross-entropy
    kl_factor: Factor = 0.0  # weight of the divergence from the teacher's logits
    mask_prompt: bool = False  # count the loss only on responses
    merge: bool = True  # False: also keep the LoRA adapter apart, beside the artefact with merged weights


class EvaluationConfig(Section):
    """What is measured after training."""

    sources: list[str] = Field(default=[])  # empty: the held-out validation sequences
    segment_length: Length | None = None  # tokens; None is data.sequence_length
    last: Positive | None = None  # count only the last tokens of a segment; None counts all
    max_segments: Positive | None = None
    batch_size: Rows = 4  # segments at once
    controls: list[Control] = Field(default=["window_only", "linear_only", "no_attention", "training_free"])


class RunConfig(Section):
    """A whole run: model, layer, data, both stages and evaluation."""

    model: str = "demo"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = (
        "run"  # the folder of the run inside runs_dir
    )
    runs_dir: str = "runs"
    seed: Seed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"  # of the teacher's linear layers while training
    linearization: LinearizationConfig = Field(default_factory=LinearizationConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        if self.quantization != "none" and self.finetune.enabled and self.finetune.method == "full":
            raise ValueError(f"finetune.method full cannot train weights of {self.quantization}; use lora")
        return self

    @field_validator("linearization", "data", "transfer", "finetune", "evaluation", mode="before")
    @classmethod
    def _read_empty_section(cls, value: object) -> object:
        # YAML reads a section whose keys are all commented out as null.
        return {} if value is None else value


def load_config(path_or_recipe: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Build the settings of a run from a file or a shipped recipe, then apply overrides.

    Args:
        path_or_recipe: a YAML file; the name of a shipped recipe ("paper", "recommended"), which wins over a file of
            that name; or None for the defaults alone.
        overrides: `key.sub=value` texts, see `parse_overrides`. A later one wins.

    Raises:
        ConfigError: no such file or recipe, broken YAML, or wrong settings; all of these in one message, a line each.
    """
    settings = {} if path_or_recipe is None else _read_settings(path_or_recipe)
    try:
        return RunConfig.model_validate(merged(settings, parse_overrides(overrides)))
    except ValidationError as error:
        valid = dotted(RunConfig().model_dump()) + [f"data.sources.{key}" for key in SourceConfig.model_fields]
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
        valid = [f"linearization.{key}" for key in LinearizationConfig.model_fields]
        lines = "; ".join(explain(error, ["linearization", *valid]))
        raise ConfigError(f"{source} cannot be used: {lines}") from error


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
    """`base` with the values of `new`, section by section."""
    nested = [key for key in new if isinstance(new[key], dict) and isinstance(base.get(key), dict)]
    return base | new | {key: merged(base[key], new[key]) for key in nested}


def _read_settings(path_or_recipe: str | Path) -> dict[str, Any]:
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
    return settings or {}


def dotted(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """All keys of nested settings, such as finetune and finetune.lr."""
    inner = {prefix + key: value for key, value in settings.items() if isinstance(value, dict)}
    return [prefix + key for key in settings] + [key for name in inner for key in dotted(inner[name], name + ".")]


def _likeness(key: str, other: str) -> float:
    # The last part counts again by itself: `windw` is near linearization.window although its section is missing.
    pairs = [(key, other), (key.rpartition(".")[2], other.rpartition(".")[2])]
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)


def explain(error: ValidationError, valid: Sequence[str]) -> list[str]:
    """What is wrong with settings, a line for each key; `valid` are all keys that there are."""
    names = {part for key in valid for part in key.split(".")}
    problems: dict[str, list[str]] = {}
    items = error.errors(include_url=False)
    for item in items[:MOST_PROBLEMS]:
        if item["loc"][-1:] == ("str",) and isinstance(item["input"], dict):
            continue  # a source with settings is no plain name: what is wrong inside it is said below
        if item["type"] == "extra_forbidden":
            path = ".".join(str(part) for part in item["loc"] if part != "SourceConfig")
            problems[path] = [f"unknown key; did you mean {max(valid, key=partial(_likeness, path))}?"]
            continue
        # A union adds the name of each of its types to the location; joined under the key they read as one sentence.
        path = ".".join(str(part) for part in item["loc"] if isinstance(part, int) or part in names)
        message = item["msg"].removeprefix("Value error, ")
        got = "" if isinstance(item["input"], dict | BaseModel) else f" (got {shorten(repr(item['input']), 100)})"
        problems.setdefault(path, []).append(message + got)
    more = [f"and {len(items) - MOST_PROBLEMS:,} more"] if len(items) > MOST_PROBLEMS else []
    return [f"{path}: {' or '.join(messages)}" if path else messages[0] for path, messages in problems.items()] + more
