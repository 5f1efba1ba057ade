"""`lolcats plan`: what a run will take, and how to lay it out, before anything is paid for."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lolcats.cli.linearize import read_target
from lolcats.cli.options import check_target
from lolcats.cli.sweep_tables import show_time
from lolcats.cli.tables import console, number_table, say
from lolcats.printable import show_bytes

if TYPE_CHECKING:
    from lolcats.planning import Estimate

STAGES = {"transfer": "stage 1", "finetune": "stage 2", "trained_window": "control: trained window"}


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, hub name, config.json, demo, or shape such as llama-3-70b-shape; or a YAML file.",
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", help="Settings of the run; else the recipe's."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="Of the settings, where no file is given.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Such as h100; else the GPU here.")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="GPUs in all, 8 a host.")] = None,
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="Of a GPU, if it is not all that it has.")] = None,
    price: Annotated[float | None, typer.Option(metavar="X", help="Of a GPU-hour.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")] = None,
) -> None:
    """Tell memory, disk, hours and cost of a run, and the cheapest layout that fits; no weights are read."""
    from lolcats.files import write_text
    from lolcats.planning import choose_machine, estimate

    file = check_target(json_file)
    target, source = _target(model, words or [], recipe)
    config = read_target(target[0], target[1:])
    machine = choose_machine(gpu, gpus, memory, price)
    found = estimate(source or config.model, config, machine)
    out = console()
    print_estimate(out, found, target)
    if file is not None:
        write_text(file, json.dumps(found.as_dict(), indent=1) + "\n")
        say(out, f"\nwritten: {file}")


def _target(model: str, words: list[str], recipe: str | None) -> tuple[list[str], str]:
    """What linearize would be told, and the model whose configuration is read, "" for that of the settings."""
    overrides = [word for word in words if "=" in word]
    files = [word for word in words if "=" not in word] + ([] if recipe is None else [recipe])
    if len(files) > 1:
        raise typer.BadParameter(f"expected one file or recipe of settings; got {', '.join(files)}")
    recipes = {item.name.removesuffix(".yaml") for item in (resources.files("lolcats") / "recipes").iterdir()}
    if files and not files[0].endswith((".yaml", ".yml")) and files[0] not in recipes:
        raise typer.BadParameter(f"{files[0]}: expected a YAML file or a recipe ({', '.join(sorted(recipes))})")
    if model.endswith((".yaml", ".yml")) or model in recipes:
        if files:
            raise typer.BadParameter(f"{model} has settings already; got {files[0]} too")
        return [model, *overrides], ""
    if files:
        plain = re.fullmatch(r"[\w./~-]*[A-Za-z/][\w./~-]*", model)
        return [files[0], f"model={model if plain else json.dumps(model)}", *overrides], model
    return [model, *overrides], model


def print_estimate(out: Console, found: Estimate, target: list[str]) -> None:
    """A screen: the stages, what they hold, the layout with its reason, and the commands."""
    from lolcats.planning import accuracy, commands, in_words

    machine, model = found.machine, found.model
    where = f"{machine.count} x {machine.gpu.name} with {machine.gpu.memory:.1f} GiB"
    added = f"{model.added / 1e6:,.1f}M added by {found.config.linearization.mixer}"
    say(out, f"{model.numbers / 1e9:,.2f}B parameters in {len(model.layers)} layers, {added}; {where}\n")
    _print_stages(out, found)
    out.print()
    _print_memory(out, found)
    disk, states = found.disk, "" if found.peak_disk == found.disk.total else " with the hidden states of blocks"
    kept = f"{show_bytes(disk.model)} model, {show_bytes(disk.checkpoints + disk.control)} checkpoints and control"
    say(out, f"\ndisk: {kept}; {show_bytes(found.peak_disk)} at most{states}")
    for stage, choice in found.chosen.items():
        say(out, f"{STAGES[stage]}: {in_words(choice.plan.layout)}; {choice.why}")
    for line in found.idle():
        say(out, line)
    say(out, f"\n{accuracy(choice.plan.layout for choice in found.chosen.values())}\n")
    for line in commands(target, found.config, found.chosen):
        say(out, line)


def _print_stages(out: Console, found: Estimate) -> None:
    price = [] if found.machine.price is None else ["cost"]
    table = number_table([""], ["tokens", "EFLOP", "GPUs", "tokens/s", "time", "GPU-hours", *price])
    for name, plan in found.parts.items():
        hours = plan.gpu_seconds / 3600
        cells = [f"{plan.tokens:,}", f"{plan.flops / 1e18:,.3g}", str(plan.gpus)]
        cells += [f"{plan.tokens / plan.seconds:,.0f}", show_time(plan.seconds), f"{hours:,.2f}"]
        table.add_row(STAGES[name], *cells, *[f"{(found.machine.price or 0) * hours:,.2f}" for _ in price])
    tokens, flops = (sum(getattr(plan, key) for plan in found.parts.values()) for key in ("tokens", "flops"))
    total = [f"{tokens:,}", f"{flops / 1e18:,.3g}", "", "", show_time(found.seconds), f"{found.gpu_hours:,.2f}"]
    table.add_row("all", *total, *[f"{found.cost:,.2f}" for _ in price])
    out.print(table)


def _print_memory(out: Console, found: Estimate) -> None:
    """Of a GPU."""
    table = number_table(
        ["GiB a GPU"],
        ["weights", "trained, with optimiser", "activations", "logits", "needed", "host", "disk"],
    )
    for name, choice in found.chosen.items():
        memory = choice.plan.memory
        held = (memory.weights, memory.trained, memory.activations, memory.logits)
        cells = [f"{count / 2**30:,.2f}" for count in held]
        disk = f"{choice.plan.disk / 2**30:,.0f}" if choice.plan.disk else "-"
        host = f"{memory.host / 2**30:,.0f}" if memory.host else "-"
        table.add_row(STAGES[name], *cells, f"{memory.needed():,.1f}", host, disk)
    out.print(table)
