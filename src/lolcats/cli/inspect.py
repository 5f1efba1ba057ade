"""`lolcats inspect`: what a model is made of, or whether it can be linearized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lolcats.cli.load import find_model, read_recipe, read_results, silence
from lolcats.cli.options import Model
from lolcats.cli.tables import console, score_table, show_bytes, show_layers

if TYPE_CHECKING:
    from lolcats.cli.facts import ModelFacts
    from lolcats.config import RunConfig

LENGTHS = {"1k": 1024, "8k": 8192, "128k": 131_072}


def inspect(model: Model) -> None:
    """Layers, parameters, memory and measured results of a model; its weights are not read."""
    from lolcats.cli.facts import read_facts

    silence()
    source = find_model(model)
    recipe, results = read_recipe(source), read_results(source)
    facts = read_facts(source)
    out = console()
    out.print(facts_table(facts, recipe))
    if facts.obstacle:
        out.print(f"\ncannot be linearized: {facts.obstacle}", markup=False)
    elif not facts.linearized:
        out.print("\ncan be linearized: ", f"lolcats linearize {model}", sep="", markup=False, soft_wrap=True)
    if facts.kv_rates:
        out.print("\nmemory of one text, by its length in tokens", markup=False)
        out.print(memory_table(facts))
    if results.get("perplexity"):
        print_results(out, results, recipe)


def facts_table(facts: ModelFacts, recipe: RunConfig | None) -> Table:
    """A line a fact."""
    table = Table.grid(padding=(0, 2))
    table.add_row("model", facts.name)
    table.add_row("layers", f"{facts.layers}")
    if facts.linearized:
        rest = [index for index in range(facts.layers) if index not in facts.linearized]
        table.add_row("linearized", f"{show_layers(facts.linearized)} ({len(facts.linearized)} layers)")
        table.add_row("softmax", show_layers(rest))
    elif not facts.obstacle:
        table.add_row("can be linearized", f"{show_layers(facts.candidates)} ({len(facts.candidates)} layers)")
    if facts.parameters:
        table.add_row("parameters", f"{facts.parameters:,} in {facts.dtype}")
    if facts.linearized:
        share = facts.added / facts.parameters
        table.add_row("added", f"{facts.added:,} of them by the linearization ({share:.2%})")
        table.add_row("implementation", facts.impl)
    if recipe is not None:
        for name, text in recipe.linearization.facts().items():
            table.add_row(name, text)
        table.add_row("recipe", f"{recipe.name}: teacher {recipe.model}, data {', '.join(recipe.data.source_names)}")
    return table


def memory_table(facts: ModelFacts) -> Table:
    """Bytes of state against bytes of keys and values."""
    table = Table("", box=None, header_style="bold")
    for name in LENGTHS:
        table.add_column(name, justify="right")
    table.add_row("softmax keys and values", *(show_bytes(facts.softmax_bytes(n)) for n in LENGTHS.values()))
    if facts.linearized:
        table.add_row("this model", *(show_bytes(facts.own_bytes(n)) for n in LENGTHS.values()))
        table.add_row("of it state of constant size", *([show_bytes(facts.state_bytes)] * len(LENGTHS)))
    return table


def print_results(out: Console, results: dict, recipe: RunConfig | None) -> None:
    """What was measured when the model was made."""
    e = results.get("evaluation", {})
    made = f"{results.get('date', '?')} on {results.get('device', '?')}, {results.get('dtype', '?')}"
    text = f"{e.get('tokens', '?')} tokens in segments of {e.get('length', '?')}"
    out.print(f"\nmeasured {made}: {text}", markup=False)
    out.print(score_table(results["perplexity"], results.get("kl", {}), recipe))
