"""Which settings a run may change when it goes on, and how those that it may not are told.

| settings                                                   | may change                             |
|------------------------------------------------------------|----------------------------------------|
| `FREE`: speed, memory, places                              | always                                 |
| `TUNABLE`: how a stage's steps are made and judged         | until the stage is finished            |
| all others of a stage                                      | until the stage has a checkpoint       |
| `evaluation`                                               | until the run is complete              |
| all others                                                 | never                                  |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.config.mixers import mixer_settings

StageState = Literal["new", "begun", "finished"]
Changes = dict[str, tuple[Any, Any]]
"""Dotted name of a setting -> what it was and what it is now."""

FREE = {
    "name", "runs_dir", "device", "data.local", "linearization.impl", "evaluation.batch_size",
    "finetune.gradient_checkpointing", "finetune.sharding.enabled", "finetune.sharding.cpu_offload",
    "finetune.lora_dynamics", "report_to",
    "transfer.blocks.hidden", "transfer.blocks.keep", "transfer.blocks.folder",
} | {
    f"{stage}.{key}"
    for stage in ("transfer", "finetune")
    for key in ("micro_batch_size", "checkpoint_every", "compile", "cuda_graph")
}  # fmt: skip
TUNABLE = {
    "lr", "schedule", "final_lr", "warmup_steps", "weight_decay", "clip", "validate_every", "plateau_factor",
    "plateau_patience",
}  # fmt: skip


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Changes:
    """The settings of `now` that have another value in `before`; settings that `now` does not know are left out."""
    found: Changes = {}
    for key, value in now.items():
        old, name = before.get(key), prefix + key
        if isinstance(value, dict) and isinstance(old, dict) and name != "data.local":
            found |= differences(old, value, f"{name}.")
        elif old != value:
            found[name] = (old, value)
    return found


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `checkpoint_settings` wrote them, with those that came later at their defaults."""
    layer = mixer_settings(settings.get("linearization"))
    kinds = {"linearization": layer, "transfer": TransferConfig, "finetune": FinetuneConfig}
    defaults = {name: kind().model_dump(mode="json") for name, kind in kinds.items() if name in settings}
    known = {name: section for name, section in settings.items() if isinstance(section, dict)}
    return {name: defaults.get(name, {}) | section for name, section in known.items()}


def with_split(settings: dict[str, Any], split: list[Any] | None) -> dict[str, Any]:
    """Settings of a run with the split that was found for it, where they leave it to be found."""
    layer = settings.get("linearization")
    if split is None or not isinstance(layer, dict) or layer.get("split") is not None:
        return settings
    if layer.get("budget", "uniform") == "uniform":
        return settings
    return settings | {"linearization": layer | {"split": split}}


def known_settings(
    settings: Mapping[str, Any], kind: type[BaseModel], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Settings without the keys that `kind` does not have, which a later version wrote; and these keys."""
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in settings.items():
        if key not in kind.model_fields:
            unknown.append(prefix + str(key))
            continue
        inner = mixer_settings(value) if key == "linearization" else kind.model_fields[key].annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            value, more = known_settings(value, inner, f"{prefix}{key}.")
            unknown += more
        known[key] = value
    return known, unknown


def forbidden(changes: Changes, stages: Mapping[str, StageState], complete: bool = False) -> Changes:
    """Those of `changes` that the run may not make any more (see the table above).

    Args:
        stages: how far "transfer" and "finetune" are.
        complete: whether everything is measured and saved.
    """
    return {name: change for name, change in changes.items() if not _may_change(name, stages, complete)}


def _may_change(name: str, stages: Mapping[str, StageState], complete: bool) -> bool:
    section, _, key = name.partition(".")
    if name in FREE:
        return True
    if section == "evaluation":
        return not complete
    state = stages.get(section)
    return state == "new" or (state == "begun" and key in TUNABLE)


def tell(changes: Changes) -> str:
    """The first few changes in words, such as "finetune.rank 8 -> 4"."""
    parts = [f"{name} {_short(old)} -> {_short(new)}" for name, (old, new) in list(changes.items())[:4]]
    more = len(changes) - len(parts)
    return ", ".join(parts) + (f" and {more} more" if more else "")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
