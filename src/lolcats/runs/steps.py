"""The steps of a run, each by itself: what one leaves in the run's folder, the next goes on with.

| step     | leaves                                                        |
|----------|---------------------------------------------------------------|
| prepare  | config.yaml, tokens in the cache, what the teacher scores      |
| transfer | checkpoints of stage 1                                         |
| finetune | checkpoints of stage 2                                         |
| save     | model/                                                         |
| control  | model/controls/trained_window, where it is asked for           |
| measure  | results.json, complete                                         |

`lolcats.linearize` does all of them in one process, to the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation.trained_window import has_window
from lolcats.runs.control import FAILED
from lolcats.runs.folder import RunFolder
from lolcats.runs.recipe import STEPS, Step, linearize


def finished(folder: RunFolder) -> list[Step]:
    """The steps of a run that need not be done again, in order.

    Raises:
        LolcatsError: a file of the run cannot be read.
    """
    config, results = folder.config(), folder.results()
    done: dict[Step, bool] = {
        "prepare": "teacher" in results.perplexity,
        "transfer": not config.transfer.enabled
        or folder.stage_state("transfer") == "finished"
        or "transfer" in results.notes,
        "finetune": not config.finetune.enabled or folder.stage_state("finetune") == "finished",
        "save": folder.has_model(),
        "control": not config.trains_window or has_window(folder.model) or results.complete or FAILED in results.notes,
        "measure": results.complete,
    }
    return STEPS[: next((number for number, step in enumerate(STEPS) if not done[step]), len(STEPS))]


def prepare(config: RunConfig, *, console: Console | None = None) -> RunFolder:
    """Make the run's folder, read the text, and measure the teacher; arguments and errors as for `linearize`."""
    return linearize(config, until="prepare", console=console)


def transfer(folder: RunFolder | Path | str, *, console: Console | None = None) -> RunFolder:
    """Stage 1.

    Args:
        folder: of a run.
        console: where progress is shown; None is silent.

    Raises:
        LolcatsError: no run is there, an earlier step has not been done, or what `linearize` raises.
    """
    return _go_on(folder, "transfer", console)


def finetune(folder: RunFolder | Path | str, *, console: Console | None = None) -> RunFolder:
    """Stage 2; see `transfer`."""
    return _go_on(folder, "finetune", console)


def save(folder: RunFolder | Path | str, *, console: Console | None = None) -> RunFolder:
    """Write the artefact, with LoRA merged; see `transfer`."""
    return _go_on(folder, "save", console)


def control(folder: RunFolder | Path | str, *, console: Console | None = None) -> RunFolder:
    """Train the window that the student is compared with, as long as stage 2 takes; see `transfer`."""
    return _go_on(folder, "control", console)


def measure(folder: RunFolder | Path | str, *, console: Console | None = None) -> RunFolder:
    """Measure the student and its controls; see `transfer`."""
    return _go_on(folder, "measure", console)


def _go_on(place: RunFolder | Path | str, step: Step, console: Console | None) -> RunFolder:
    folder = place if isinstance(place, RunFolder) else RunFolder(Path(place))
    if not folder.config_file.is_file():
        raise LolcatsError(f"{folder.path} is no run: expected config.yaml in it; the step prepare makes one")
    done = finished(folder)
    if step in done:
        return folder
    if missing := [other for other in STEPS[: STEPS.index(step)] if other not in done]:
        raise LolcatsError(f"{folder.path}: the step {missing[0]} has not been done yet, which {step} goes on with")
    config = folder.config().model_copy(update={"runs_dir": str(folder.path.parent), "name": folder.path.name})
    return linearize(config, resume=True, until=step, console=console)
