"""`lolcats inspect`: what a model is made of, or whether it can be linearized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lolcats.cli.analysis_tables import kept_line, layers_table, share_line
from lolcats.cli.load import find_model, read_recipe, read_results
from lolcats.cli.options import Model
from lolcats.cli.tables import console, number_table, say, score_table, show_layers
from lolcats.printable import show_bytes

if TYPE_CHECKING:
    from lolcats.config import RunConfig
    from lolcats.evaluation.facts import ModelFacts
    from lolcats.evaluation.memory import TextMemory
    from lolcats.runs.results import Results

LENGTHS = {"1k": 1024, "8k": 8192, "128k": 131_072}


def inspect(model: Model) -> None:
    """Layers, parameters, memory and measured results of a model; its weights are not read."""
    from lolcats.evaluation.facts import read_facts

    source = find_model(model)
    recipe, results = read_recipe(source), read_results(source)
    facts = read_facts(source)
    out = console()
    out.print(facts_table(facts, recipe))
    if facts.obstacle:
        out.print(f"\ncannot be linearized: {facts.obstacle}")
    elif not facts.linearized:
        say(out, f"\ncan be linearized: lolcats linearize {model}")
    if facts.kv_rates:
        out.print("\nmemory of one text, by its length in tokens")
        out.print(memory_table(facts))
    if facts.memory is not None:
        out.print(f"\n{facts.memory.line()}")
        out.print(layer_table(facts.memory))
    if results.perplexity:
        print_results(out, results, recipe)
    if facts.linearized:
        print_analysis(out, Path(source))


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
    table = number_table([""], LENGTHS)
    table.add_row("softmax keys and values", *(show_bytes(facts.softmax_bytes(n)) for n in LENGTHS.values()))
    if facts.linearized:
        table.add_row("this model", *(show_bytes(facts.own_bytes(n)) for n in LENGTHS.values()))
        table.add_row("of it state of constant size", *([show_bytes(facts.state_bytes)] * len(LENGTHS)))
    return table


def layer_table(memory: TextMemory) -> Table:
    """A row for each run of layers with states of one size, and what is in them in KV tokens."""
    parts = list(dict.fromkeys(part for layer in memory.layers for part in layer.parts))
    table = number_table(["layers"], ["bytes", "KV token of the teacher", "KV tokens", *parts])
    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in memory.layers:
        split = [f"{layer.parts[part]:,.1f}" if part in layer.parts else "-" for part in parts]
        row = (show_bytes(layer.bytes), show_bytes(layer.kv_token_bytes), f"{layer.kv_tokens:,.1f}", *split)
        alike.setdefault(row, []).append(layer.layer)
    for row, layers in alike.items():
        table.add_row(show_layers(layers), *row)
    return table


def print_results(out: Console, results: Results, recipe: RunConfig | None) -> None:
    """What was measured when the model was made."""
    made = f"{results.date or '?'} on {results.device or '?'}, {results.dtype or '?'}"
    text = f"{results.evaluation.tokens or '?'} tokens in segments of {results.evaluation.length or '?'}"
    out.print(f"\nmeasured {made}: {text}")
    out.print(score_table(results.perplexity, results.kl, recipe))


def print_analysis(out: Console, source: Path) -> None:
    """What an analysis has found: worst layers, where they look, which pairs they keep; or how to make one."""
    from lolcats.evaluation.analysis import read_analysis

    run = source.parent if (source.parent / "config.yaml").is_file() else source
    analysis = read_analysis(source) or read_analysis(run)
    if analysis is None or not analysis.layers:
        if run.is_dir():
            say(out, f"\nerrors, far shares and kept pairs by layer and head: lolcats report {run}")
        return
    text = analysis.text
    read = "" if text is None else f": {text.segments * text.length:,} tokens of {text.source}"
    out.print(f"\nworst layers, analysed {analysis.date} on {analysis.device}{read}")
    out.print(layers_table(analysis.layers))
    say(out, f"\n{share_line(analysis.layers)}")
    if line := kept_line(analysis):
        say(out, line)
