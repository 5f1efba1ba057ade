"""How the layers of a model would share a budget of memory, without a run: `lolcats plan-memory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.utils import set_seed

from lolcats.config import RunConfig
from lolcats.config.split import sizes_by_layer
from lolcats.data import build_datasets
from lolcats.errors import LolcatsError
from lolcats.evaluation.memory import LayerMemory, text_memory
from lolcats.modeling import convert
from lolcats.modeling.convert import check_supported
from lolcats.models.device import choose_device, choose_dtype
from lolcats.models.teacher import load_teacher
from lolcats.runs.state import start_batch
from lolcats.training import TrainingData

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class MemoryPlan:
    """What each layer gets."""

    config: RunConfig
    """The settings with the split in them."""
    layers: list[tuple[LayerMemory, list[list[int]]]]
    """Of each linearized layer its memory, and [window, pairs] of each key head, or one for all."""


def plan_memory(config: RunConfig, console: Console | None = None) -> MemoryPlan:
    """Find the split that a run with these settings would find.

    Args:
        config: settings whose layers have a budget to share.
        console: where progress is shown; None is silent.

    Raises:
        LolcatsError: there is nothing to find, or what `linearize` raises before it trains.
    """
    if not config.linearization.searches:
        raise LolcatsError(
            f"nothing to share: expected mixer blend, budget layers or heads, and no split; got mixer "
            f"{config.linearization.mixer}, {config.linearization.in_words()}"
        )
    set_seed(config.seed)
    device = choose_device(config.device)
    model, tokenizer = load_teacher(config.model, choose_dtype(config.dtype, device), device, config.quantization)
    check_supported(model)
    texts = build_datasets(config.data, tokenizer, config.seed, teacher=model, console=console)
    convert(model, config.linearization, input_ids=start_batch(config, TrainingData(*texts, tokenizer=tokenizer)))
    found = config.linearization.model_copy(update={"split": model.config.linearization["split"]})
    memory = text_memory(model)
    assert memory is not None
    layers = list(zip(memory.layers, sizes_by_layer(found.model_dump()["split"]), strict=True))
    return MemoryPlan(config.model_copy(update={"linearization": found}), layers)
