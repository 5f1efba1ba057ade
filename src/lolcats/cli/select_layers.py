"""`lolcats select-layers`: which layers of a model should keep softmax attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lolcats.cli.options import Device, Dtype, check_target
from lolcats.cli.suite import bar
from lolcats.cli.tables import console, number_table, say, show_layers
from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from lolcats.config import RunConfig
    from lolcats.evaluation.layer_scores import LayerScore

MODES = {"window": "equal_window", "layer": "full"}
"""Value of --replace -> mode of a layer that is replaced."""
KINDS = {"kl": "kl", "kl-rest": "kl_rest", "halo": "halo"}

Model = Annotated[str, typer.Argument(metavar="MODEL", help='A hub name, folder, .gguf file or "demo".')]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as linearization.window=128.")
]
Recipe = Annotated[str, typer.Option(metavar="NAME", help="A recipe or YAML file, for the settings of the layer.")]
Keep = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the layers that keep softmax.")]
Kind = Annotated[
    str,
    typer.Option(
        "--score",
        metavar="NAME",
        help="kl (what changes where a layer alone is replaced), kl-rest (where all others are) or halo (recall lost "
        "for what is lost elsewhere, arXiv 2601.22156).",
    ),
]
Replace = Annotated[
    str, typer.Option(metavar="NAME", help="By what: a window of the same memory, or the untrained layer itself.")
]
Sources = Annotated[list[str] | None, typer.Option(help="Text to measure on; repeatable. Default: python-docs.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per segment, and of a question of halo.")]
Segments = Annotated[int, typer.Option(min=1, help="Segments to read.")]
Questions = Annotated[int, typer.Option(min=1, help="Passkeys to ask for, for halo.")]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=check_target, help="Write settings with the layers that linearize takes."),
]


def select_layers(
    model: Model,
    overrides: Overrides = None,
    recipe: Recipe = "recommended",
    keep: Keep = 0.25,
    score: Kind = "kl",
    replace: Replace = "window",
    sources: Sources = None,
    length: Length = 1024,
    segments: Segments = 2,
    questions: Questions = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Output = None,
) -> None:
    """Rank the layers of a model by what it loses without their softmax attention, before anything is trained."""
    for name, value, known in (("--score", score, KINDS), ("--replace", replace, MODES)):
        if value not in known:
            raise typer.BadParameter(f"{name} {value}: expected {', '.join(known)}")
    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise LolcatsError(f"--output {output}: expected the name of a .yaml file")
    from lolcats.config import load_config

    config = load_config(recipe, [f"model={json.dumps(model)}", *(overrides or [])])
    out = console()
    amount = {"length": length, "segments": segments, "questions": questions if score == "halo" else 0}
    scores = _measure(out, config, KINDS[score], MODES[replace], sources or ["python-docs"], device, dtype, amount)
    _report(out, config, scores, score, keep, output)


def _measure(
    out: Console,
    config: RunConfig,
    kind: Any,
    mode: str,
    sources: list[str],
    device: str,
    dtype: str,
    amount: dict[str, int],
) -> list[LayerScore]:
    from lolcats.data.sources import check_source
    from lolcats.evaluation.compare import read_segments
    from lolcats.evaluation.layer_scores import passkeys, score_layers
    from lolcats.modeling import convert
    from lolcats.models.context import check_context
    from lolcats.models.device import choose_device, choose_dtype
    from lolcats.models.teacher import load_teacher
    from lolcats.models.vocabulary import vocabulary_size

    for source in sources:
        check_source(source, config.data.local)
    place, length = choose_device(device), amount["length"]
    teacher, tokenizer = load_teacher(config.model, dtype=choose_dtype(dtype, place), device=place)
    check_context(teacher, length, "a segment")
    size = vocabulary_size(teacher)
    text = read_segments(sources, config.data.local, tokenizer, size, length, amount["segments"])
    layer = config.linearization
    if layer.searches:  # a budget is shared by the layers that are chosen, which these are not yet
        layer = layer.model_copy(update={"budget": "uniform"})
    convert(teacher, layer, input_ids=text)
    asked, count = passkeys(tokenizer, length, amount["questions"]) if amount["questions"] else ([], 1)
    with bar(out, "texts") as show:
        return score_layers(
            teacher, text, kind, mode=mode, questions=asked, answer_tokens=count,
            progress=lambda done, total: show("texts", done, total),
        )  # fmt: skip


def _report(
    out: Console, config: RunConfig, scores: list[LayerScore], kind: str, keep: float, output: Path | None
) -> None:
    from lolcats.config import dump_config
    from lolcats.evaluation.layer_scores import split_layers
    from lolcats.files import write_text

    kept, others = split_layers(scores, keep)
    table = number_table([], ["layer", kind, "KL to teacher", "perplexity", "log p of passkeys", "keeps softmax"])
    for item in scores:
        recall = "" if item.recall is None else f"{item.recall:.3f}"
        numbers = (f"{item.score:.4g}", f"{item.kl:.4g}", f"{item.perplexity:.2f}", recall)
        table.add_row(str(item.layer), *numbers, "yes" if item.layer in kept else "")
    out.print(table)
    say(out, f"\nsoftmax: {show_layers(kept)}; linearized:")
    say(out, f"linearization.layers: {others}")
    if output is not None:
        config.linearization.layers = others
        write_text(output, dump_config(config))
        say(out, f"\nlolcats linearize {output}")
