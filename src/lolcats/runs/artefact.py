"""The artefact, a folder that `AutoModelForCausalLM.from_pretrained` loads after `import lolcats`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig, dump_config
from lolcats.files import atomic_folder, write_text
from lolcats.models.quantization import dequantize, dequantize_below
from lolcats.models.sharded import is_shard
from lolcats.models.shards import SHARD_BYTES
from lolcats.runs.results import Results

if TYPE_CHECKING:
    from peft import PeftModel

    from lolcats.training import FinetuneStage

RECIPE_FILE = "lolcats_recipe.yaml"
RESULTS_FILE = "lolcats_results.json"


def save_artefact(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    results: Results,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write model, tokenizer, recipe and measured results; the folder appears only when it is complete.

    Args:
        weights: those of the model by name, where it has others now; None: its own.

    Raises:
        LolcatsError: the disk is full or the place cannot be written; nothing is left behind then.
    """
    with atomic_folder(folder) as temporary:
        # A shard of a GPU's model is held in memory.
        model.save_pretrained(temporary, state_dict=weights, max_shard_size=SHARD_BYTES)
        tokenizer.save_pretrained(temporary)
        (temporary / RECIPE_FILE).write_text(dump_config(config))
        (temporary / RESULTS_FILE).write_text(results.text())


def save_results(folder: Path, results: Results) -> None:
    """Replace the measured results in an artefact; raises as `save_artefact` does."""
    write_text(folder / RESULTS_FILE, results.text())


def save_adapter(folder: Path, adapter: PeftModel) -> None:
    """Write an adapter apart from the artefact, for those who want it alone; raises as `save_artefact` does."""
    with atomic_folder(folder) as temporary:
        adapter.save_pretrained(str(temporary))


def unpack(model: PreTrainedModel, stage: FinetuneStage | None, dtype: torch.dtype) -> None:
    """Write the quantized weights out in `dtype`, in place, before adapters are merged into them."""
    if stage is not None and stage.adapter is not None:
        stage.adapter = dequantize_below(stage.adapter, dtype)
    else:
        dequantize(model, dtype)


@contextmanager
def unchanged(model: nn.Module, merging: bool = True) -> Iterator[None]:
    """Undo at the end, to the last bit, what happens to a model inside: merging, unpacking, casting, other modules.

    The artefact is made inside, and what was trained is measured afterwards. Weights that carry adapters are changed in
    place by merging them, so there are two copies of those meanwhile; without `merging` there is one, and nothing may
    write into weights inside.
    """
    owners = [*model.modules(), *{id(c): c for m in model.modules() if (c := getattr(m, "config", None))}.values()]
    kept = [(owner, {key: _shallow(value) for key, value in vars(owner).items()}) for owner in owners]
    weights = [(p, p.data) for p in model.parameters() if not is_shard(p)]  # nothing writes into shards
    for module in model.modules() if merging else ():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if weight is not None and weight.is_floating_point():
            weight.data = weight.data.clone()
    try:
        yield
    finally:
        for owner, attributes in kept:
            vars(owner).clear()
            vars(owner).update(attributes)
        for p, data in weights:
            p.data = data


def _shallow(value: Any) -> Any:
    """A container of its own with the same content."""
    return value.copy() if isinstance(value, dict | list | set) else value
