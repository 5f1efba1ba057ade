"""Find and load the model that a verb was given."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lolcats.cli.options import device_map_of
from lolcats.errors import LolcatsError
from lolcats.models.folder import expand_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lolcats.config import RunConfig
    from lolcats.runs.results import Results


def silence() -> None:
    """No progress bars and no warnings of transformers and the hub's client: what matters is said by us."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each time that it asks in vain, where no network is
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that weights are where the device map places them
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def find_model(source: str) -> str:
    """`source` with `~` written out, or the model inside it if it is the folder of a run.

    Raises:
        LolcatsError: it is the folder of a run that has no model yet.
    """
    source = expand_model(source)
    folder = Path(source)
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return source
    if not (folder / "model" / "config.json").is_file():
        raise LolcatsError(
            f"{folder} is a run without a model yet; finish it: lolcats linearize {folder / 'config.yaml'} --resume"
        )
    return str(folder / "model")


def read_recipe(source: str) -> RunConfig | None:
    """The recipe in a model's folder, None where there is none."""
    from lolcats.config import load_config
    from lolcats.runs.artefact import RECIPE_FILE

    file = Path(source) / RECIPE_FILE
    return load_config(file) if file.is_file() else None


def read_results(source: str) -> Results:
    """The measured results in a model's folder, empty where there are none."""
    from lolcats.runs.artefact import RESULTS_FILE
    from lolcats.runs.results import read_results

    return read_results(Path(source) / RESULTS_FILE, "delete it to go on without the numbers")


def length_note(source: str, tokens: int) -> str | None:
    """What to say of a text that is longer than those on which a model was measured; None of others, or if unknown."""
    try:
        measured = read_results(find_model(source)).evaluation.length
    except LolcatsError:  # the numbers are not needed here
        return None
    if measured is None or tokens <= measured:
        return None
    return (
        f"note: prompt and continuation may have {tokens:,} tokens, and this model was measured on texts of "
        f"{measured:,}: lolcats evaluate {source} --length {tokens} --by-position shows what it does beyond"
    )


def load_model(
    source: str, device: str, dtype: str, graphs: bool = True, device_map: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready to run; a linearized model keeps its own format unless `dtype` names another.

    `graphs` says whether it decodes by CUDA graphs, `device_map` what the option of this name says.
    """
    from lolcats.modeling import linearized_layers
    from lolcats.modeling.decode_graphs import set_decode_graphs
    from lolcats.models.device import choose_device, choose_dtype
    from lolcats.models.device_map import first_device
    from lolcats.models.teacher import load_teacher
    from lolcats.runs.artefact import RECIPE_FILE

    folder, places = find_model(source), device_map_of(device_map, device)
    place = choose_device(device) if places is None else first_device(places)
    own = dtype == "auto" and (Path(folder) / RECIPE_FILE).is_file()
    wanted = None if own else choose_dtype(dtype, place)
    model, tokenizer = load_teacher(folder, dtype=wanted, device=place, device_map=places)
    if not graphs and linearized_layers(model):  # a teacher has none
        set_decode_graphs(model, False)
    return model, tokenizer
