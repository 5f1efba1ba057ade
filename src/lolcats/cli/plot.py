"""`lolcats plot`: perplexity and recall of many students against the memory of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats.cli.options import check_target
from lolcats.cli.tables import console, say

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Folders of runs, models and sweeps; .csv files of this verb; .json files of lolcats recall, about "
        "models among the sources.",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        metavar="FILE", callback=check_target, help="The picture (.png, .pdf or .svg); a .csv file beside it."
    ),
]


def plot(sources: Sources, output: Output = Path("memory.png")) -> None:
    """Perplexity and recall against memory: a line a kind of layer, plain windows and the teacher among them."""
    from lolcats.evaluation.recall.plot import check_figure
    from lolcats.models.folder import expand
    from lolcats.sweep.memory_plot import plot_memory
    from lolcats.sweep.points import read_points

    check_figure(output)
    points = read_points([expand(source) for source in sources])
    files = plot_memory(points, output)
    lines = dict.fromkeys(point.line for point in points)
    say(console(), f"{len(points)} points of {len(lines)} lines: {', '.join(map(str, files))}")
