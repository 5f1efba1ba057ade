"""`lolcats linearize`: run a whole recipe."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from lolcats.cli.load import silence
from lolcats.cli.tables import console, score_table

if TYPE_CHECKING:
    from lolcats.config import RunConfig
    from lolcats.runs.folder import RunFolder


def linearize(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help='A YAML file or a recipe (paper, recommended); or a model: hub name, folder, .gguf file or "demo", '
            "with the recipe recommended.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as finetune.lr=1e-4.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run from its last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run of the same name first.")] = False,
    until: Annotated[
        str, typer.Option(metavar="STEP", help="Stop after prepare, transfer, finetune, save or measure.")
    ] = "measure",
) -> None:
    """Linearize a model: transfer attention, fine-tune, measure, save."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite deletes it; give one of them")
    config = read_target(target, overrides or [])
    if until not in ("prepare", "transfer", "finetune", "save", "measure"):
        raise typer.BadParameter(f"--until {until}: expected prepare, transfer, finetune, save or measure")

    from accelerate import PartialState

    from lolcats.runs.recipe import linearize as run_recipe

    silence()
    out = console()
    folder = run_recipe(config, resume=resume, overwrite=overwrite, until=cast(Any, until), console=out)
    if not PartialState().is_main_process:
        return
    if folder.results().complete:
        print_run(out, config, folder)
    else:
        out.print(f"\nstopped after {until}; --resume does the rest: {folder.path}", markup=False, soft_wrap=True)


def read_target(target: str, overrides: list[str]) -> RunConfig:
    """The settings for a YAML file, a recipe or a model."""
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
    if results.memory is not None:
        out.print(f"\n{results.memory.line()}", markup=False, soft_wrap=True)
    print_generations(out, results.generation)
    if line := results.time_line():
        out.print(f"\n{line}", markup=False, soft_wrap=True)
    for what, text in results.notes.items():
        out.print(f"{what}: {text}", markup=False, soft_wrap=True)
    out.print(f"\nmodel: {folder.model}", markup=False, soft_wrap=True)
    out.print(f"try it: lolcats generate {show_path(folder.model)} 'Once upon a time'", markup=False, soft_wrap=True)
    loading = f"AutoModelForCausalLM.from_pretrained({str(folder.model)!r})"
    out.print(
        f"in Python: import lolcats; from transformers import AutoModelForCausalLM; {loading}",
        markup=False,
        soft_wrap=True,
    )


def print_generations(out: Console, generation: dict[str, str]) -> None:
    """The same prompt continued by teacher and student."""
    if "prompt" in generation:
        out.print(f"\n{generation['prompt']} ...", markup=False)
    for name in ("teacher", "student"):
        if name in generation:
            out.print(f"  {name}: ... {' '.join(generation[name].split())}", markup=False)


def show_path(path: Path) -> str:
    """A path as one would type it in a shell."""
    import shlex

    return shlex.quote(str(path))
