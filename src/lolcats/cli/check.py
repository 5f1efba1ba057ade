"""`lolcats check`: whether lolcats understands what a model does, before hours of training go into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from lolcats.cli.failures import one_line
from lolcats.cli.load import load_model
from lolcats.cli.options import Device, Dtype, Model
from lolcats.cli.tables import console, say

if TYPE_CHECKING:
    from lolcats.modeling import FamilyCheck


def check(model: Model, device: Device = "auto", dtype: Dtype = "auto") -> None:
    """Compare a model with its own linearization, where both must be the same; exit code 1 if they are not.

    A model that is not linearized is converted in memory, with untrained settings. Nothing is written.
    """
    from lolcats.modeling import check_model, convert, linearized_layers

    network, _ = load_model(model, device, dtype)
    if not linearized_layers(network):
        convert(network)
    result = check_model(network)
    out = console()
    for line in fact_lines(result):
        say(out, line)
    if not result.ok:
        raise typer.Exit(1)


def fact_lines(result: FamilyCheck) -> list[str]:
    """A line per fact: whether it holds, what it says, and how far the model is from it."""
    lines = []
    for fact in result.facts:
        distance = fact.problem or f"off by {fact.value:.1e}, at most {fact.tolerance:.1e}"
        lines.append(f"{'ok ' if fact.ok else 'NOT'}  {fact.name:<15}  {fact.meaning}: {one_line(distance)}")
    wrong = sum(not fact.ok for fact in result.facts)
    lines.append(f"{result.model}: {'understood' if not wrong else f'not understood, {wrong} facts do not hold'}")
    return lines
