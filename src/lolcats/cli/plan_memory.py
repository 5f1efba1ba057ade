"""`lolcats plan-memory`: how layers and key heads would share the memory of a window and kept pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lolcats.cli.linearize import read_target
from lolcats.cli.options import check_target
from lolcats.cli.tables import console, number_table, say

if TYPE_CHECKING:
    from lolcats.runs.memory_plan import MemoryPlan


def plan_memory(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A YAML file or a recipe; or a model, as for linearize, with the recipe recommended."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as linearization.budget=layers."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Write the settings, which `linearize` takes.")
    ] = None,
) -> None:
    """Find how layers and key heads best share the memory of a uniform setting, from a batch of text.

    Settings without a budget share it among key heads (linearization.budget=heads). Nothing is trained.
    """
    from lolcats.config import dump_config
    from lolcats.files import write_text
    from lolcats.runs.memory_plan import plan_memory as find_plan

    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise typer.BadParameter(f"--output {output}: expected a name that ends in .yaml")
    file = check_target(output)
    config = read_target(target, overrides or [])
    if getattr(config.linearization, "budget", "") == "uniform":
        config = read_target(target, [*(overrides or []), "linearization.budget=heads"])
    out = console()
    plan = find_plan(config, out)
    out.print(plan_table(plan))
    if file is not None:
        write_text(file, dump_config(plan.config))
        say(out, f"\nwritten: {file}; go on with: lolcats linearize {file}")


def plan_table(plan: MemoryPlan) -> Table:
    """A row for each layer, and their sum."""
    from lolcats.config.split import spread

    table = number_table(["layer", "windows", "pairs"], ["KV tokens", "share of total"])
    total = sum(memory.bytes for memory, _ in plan.layers)
    tokens = sum(memory.bytes / memory.kv_token_bytes for memory, _ in plan.layers)
    for memory, sizes in plan.layers:
        windows, pairs = ([str(number) for number in numbers] for numbers in zip(*sizes, strict=True))
        share = f"{memory.bytes / total:.1%}"
        table.add_row(str(memory.layer), " ".join(windows), " ".join(pairs), f"{memory.kv_tokens:,.1f}", share)
    windows, pairs = (spread(list(n)) for n in zip(*(size for _, sizes in plan.layers for size in sizes), strict=True))
    table.add_row("all", windows, pairs, f"{tokens:,.1f}", "100.0%")
    return table
