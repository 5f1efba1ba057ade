"""What is exported: a finished run or a linearized model's folder, and what of its recipe others may see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lolcats.config import RunConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.models.folder import expand
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results, read_results
from lolcats.runs.trained import added_file

ADAPTER_FILE = "adapter_config.json"
WITHOUT = "delete it to export without numbers"


@dataclass
class Source:
    """A linearized model on disk."""

    model: Path
    """Folder with config.json and safetensors; not there where `run` has trained a model and not saved it."""
    run: RunFolder | None
    """The run that made it, None where only the model is there."""
    config: RunConfig
    results: Results

    @property
    def has_model(self) -> bool:
        """Whether the model is there; else it is put together from what the run has trained."""
        return (self.model / "config.json").is_file()


def open_source(place: Path) -> Source:
    """The model at `place`, a run's folder or a model's.

    Raises:
        LolcatsError: nothing is there, the run has not finished, or it was not made by a recipe.
    """
    place = expand(place)
    run = next((RunFolder(p) for p in (place, place.resolve().parent) if _is_run_of(p, place)), None)
    model = run.model if run is not None else place
    if run is not None and not (model / "config.json").is_file():
        if not added_file(run).is_file():
            raise LolcatsError(
                f"{place} is a run without a model yet; finish it with {run.config_file} first", hint="finish_run"
            )
        return Source(model, run, run.config(), run.results())
    if (place / ADAPTER_FILE).is_file() and not (model / "config.json").is_file():
        raise LolcatsError(
            f"{place} is an exported adapter, whose weights are those of its base model; export the run that it is "
            "from, or save load_adapter(...)[0].merge_and_unload() with lolcats_recipe.yaml beside it"
        )
    if not (model / "config.json").is_file():
        raise LolcatsError(f"no linearized model or run at {place}; expected a folder that lolcats linearize wrote")
    if not (model / RECIPE_FILE).is_file():
        raise LolcatsError(
            f"{model} has no {RECIPE_FILE}: without its recipe nobody could know how the model was made; "
            "expected a folder that lolcats linearize wrote"
        )
    return Source(model, run, load_config(model / RECIPE_FILE), read_results(model / RESULTS_FILE, WITHOUT))


def _is_run_of(folder: Path, place: Path) -> bool:
    run = RunFolder(folder)
    own = folder == place and not (place / "config.json").is_file()
    return run.config_file.is_file() and (own or run.model == place.resolve())


def is_local(name: str) -> bool:
    """Whether a model or data source is a path that says something only on one machine."""
    return name.startswith(("/", "~", ".", "\\")) or Path(name).is_absolute() or name.endswith(".gguf")


def last_part(name: str) -> str:
    """A path without its folders; other names as they are."""
    return Path(name).name if is_local(name) else name


def without_paths(config: RunConfig, base: str) -> RunConfig:
    """The recipe as strangers may read it: `base` as its teacher, file names instead of paths."""
    settings = config.model_dump()
    settings["model"] = base
    settings["runs_dir"] = RunConfig().runs_dir
    settings["data"]["local"] = {}
    for section in ("data", "evaluation"):
        sources = settings[section]["sources"]
        settings[section]["sources"] = [
            source | {"name": last_part(source["name"])} if isinstance(source, dict) else last_part(source)
            for source in sources
        ]
    return RunConfig.model_validate(settings)
