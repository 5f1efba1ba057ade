"""`lolcats linearize`: run a whole recipe."""

from __future__ import annotations

import json
import shlex
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from lolcats.cli.suite import print_memory
from lolcats.cli.tables import console, say, score_table

if TYPE_CHECKING:
    from lolcats.config import RunConfig
    from lolcats.runs.folder import RunFolder


def linearize(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A YAML file or a recipe (recommended, small, recall, hybrid, paper); or a model: hub name, folder, "
            '.gguf file or "demo", with the recipe recommended.',
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as finetune.lr=1e-4.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run from its last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run of the same name first.")] = False,
    until: Annotated[
        str, typer.Option(metavar="STEP", help="Stop after prepare, transfer, finetune, save, control or measure.")
    ] = "measure",
) -> None:
    """Linearize a model: transfer attention, fine-tune, measure, save."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite deletes it; give one of them")
    config = read_target(target, overrides or [])
    if until not in ("prepare", "transfer", "finetune", "save", "control", "measure"):
        raise typer.BadParameter(f"--until {until}: expected prepare, transfer, finetune, save, control or measure")

    from accelerate import PartialState

    from lolcats.runs.recipe import linearize as run_recipe

    out = console()
    folder = run_recipe(config, resume=resume, overwrite=overwrite, until=cast(Any, until), console=out)
    if not PartialState().is_main_process:
        return
    if folder.results().complete:
        print_run(out, config, folder)
    else:
        say(out, f"\nstopped after {until}; --resume does the rest: {folder.path}")


def read_target(target: str, overrides: list[str]) -> RunConfig:
    """The settings for a YAML file, a recipe or a model, which takes the recipe recommended."""
    from lolcats.config import load_config

    recipes = {item.name for item in (resources.files("lolcats") / "recipes").iterdir()}
    if target.endswith((".yaml", ".yml")) or f"{target}.yaml" in recipes:
        return load_config(target, overrides)
    return load_config("recommended", [f"model={json.dumps(target)}", *overrides])


def print_run(out: Console, config: RunConfig, folder: RunFolder) -> None:
    """What a finished run has measured, wrote, and where its model is."""
    results = folder.results()
    out.print()
    out.print(score_table(results.perplexity, results.kl, config))
    print_memory(out, results.memory)
    if "prompt" in results.generation:
        out.print(f"\n{results.generation['prompt']} ...")
    for name in ("teacher", "student"):
        if name in results.generation:
            out.print(f"  {name}: ... {' '.join(results.generation[name].split())}")
    if line := results.time_line():
        say(out, f"\n{line}")
    for what, text in results.notes.items():
        say(out, f"{what}: {text}")
    say(out, f"\nmodel: {folder.model}")
    say(out, f"try it: lolcats generate {shlex.quote(str(folder.model))} 'Once upon a time'")
    loading = f"AutoModelForCausalLM.from_pretrained({str(folder.model)!r})"
    say(out, f"in Python: import lolcats; from transformers import AutoModelForCausalLM; {loading}")
