"""`lolcats report`: one page of what runs and models kept and lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats.cli.options import Device, Dtype, check_target
from lolcats.cli.suite import Teacher, bar
from lolcats.cli.tables import console, say

PAGE = "report.html"
Sources = Annotated[
    list[str],
    typer.Argument(metavar="RUN|MODEL...", help="Folders of runs, finished or not, and of linearized models."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html",
        callback=check_target,
        help="The page; FILE_files/ has its charts as PNG and CSV. Default: report.html in the folder of the run, of "
        "several or of a model here.",
    ),
]
Results = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE", help="Of lolcats evaluate, benchmark or recall, from outside of their folders; repeatable."
    ),
]
Analysis = Annotated[
    bool, typer.Option(help="Analyse models that were not yet: layers, heads, kept pairs, attention, texts. Minutes.")
]
Layers = Annotated[list[int] | None, typer.Option("--layer", min=0, help="Analyse these alone; repeatable.")]
Head = Annotated[int | None, typer.Option(min=0, help="The head that the maps of attention show at first.")]
Texts = Annotated[
    list[str] | None, typer.Option("--text", metavar="TEXT|FILE", help="For the maps of attention; repeatable.")
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="For both models to continue; repeatable.")
]
Segments = Annotated[int | None, typer.Option(min=1, help="Of the text that is analysed, at most. Default: 2.")]


def report(
    sources: Sources,
    output: Output = None,
    results: Results = None,
    analysis: Analysis = True,
    layer: Layers = None,
    head: Head = None,
    text: Texts = None,
    prompt: Prompts = None,
    segments: Segments = None,
    teacher: Teacher = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """One self-contained page: a verdict, quality beside the controls, memory, recall, layers, heads, training."""
    from lolcats.models.folder import expand
    from lolcats.report import Wanted, add_analyses, check_report, gather, write_report

    places = [expand(source) for source in sources]
    output = output or _own_place(places)
    check_report(output)
    out = console()
    wanted = Wanted(layer or (), text or (), prompt or (), segments, teacher, device, dtype)
    with bar(out, "reading") as show:
        subjects = gather(places, [expand(file) for file in results or []])
        if analysis:
            add_analyses(subjects, wanted, show)
        files = write_report(subjects, output, first_head=head, progress=show)
    for subject in subjects:
        for note in subject.notes:
            say(out, f"{subject.name}: {note}")
    say(out, f"{files[0]} ({files[0].stat().st_size / 1e6:.1f} MB), its charts and numbers in {files[1]}")


def _own_place(places: list[Path]) -> Path:
    """Where the page goes unless it is told: with one run into its folder, from where it is exported with the model."""
    alone = len(places) == 1 and (places[0] / "config.yaml").is_file()
    return places[0] / PAGE if alone else Path(PAGE)
