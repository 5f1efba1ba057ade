"""`lolcats report`: one page of what runs and models kept and lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats.cli.options import check_target
from lolcats.cli.suite import bar
from lolcats.cli.tables import console, say

Sources = Annotated[
    list[str],
    typer.Argument(metavar="RUN|MODEL...", help="Folders of runs, finished or not, and of linearized models."),
]
Output = Annotated[
    Path,
    typer.Option(
        metavar="FILE.html",
        callback=check_target,
        help="The page; beside it FILE_files/ with PNG and CSV of all charts.",
    ),
]
Results = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE", help="Of lolcats evaluate, benchmark or recall, about one of them, from elsewhere; repeatable."
    ),
]


def report(sources: Sources, output: Output = Path("report.html"), results: Results = None) -> None:
    """One self-contained page: a verdict, quality beside the controls, memory, recall, layers, heads, training."""
    from lolcats.models.folder import expand
    from lolcats.report import check_report, gather, write_report

    check_report(output)
    out = console()
    with bar(out, "reading") as show:
        subjects = gather([expand(source) for source in sources], [expand(file) for file in results or []])
        files = write_report(subjects, output, show)
    for subject in subjects:
        for note in subject.notes:
            say(out, f"{subject.name}: {note}")
    say(out, f"{files[0]} ({files[0].stat().st_size / 1e6:.1f} MB), figures in {files[1]}")
