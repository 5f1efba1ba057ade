"""Which pairs are kept: where they stand in the text, which tokens they are, how long they stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from lolcats.evaluation.analysis.file import KeptAnalysis
from lolcats.report.charts.theme import VERMILLION, base, choice, chosen, finished
from lolcats.report.figure import Figure, Table, spread_words
from lolcats.report.subject import Subject

MOST_TOLD = 25_000
"""Pairs up to which their tokens and scores are in the chart too."""
SUMS = ("candidates", "stay_mean", "overlap_oracle", "overlap_recency")


def kept_figures(subjects: Sequence[Subject]) -> Iterator[Figure]:
    """The pairs of each layer, and a table of how they do."""
    known = [
        (subject.name, kept) for subject in subjects for kept in (subject.analysis and subject.analysis.kept) or []
    ]
    if not known:
        return
    drawn = [
        {"run": run, "layer": kept.layer, "key_head": kept.key_head, "position": kept.positions,
         "token": [_shown(token) for token in kept.tokens], "score": kept.scores}
        for run, kept in known
        if kept.positions
    ]  # fmt: skip
    if drawn:
        yield _pairs_figure(drawn)
    rows = [
        [run, kept.layer, kept.key_head, len(kept.positions), *(getattr(kept, s) for s in SUMS)] for run, kept in known
    ]
    yield Figure(
        key="kept_sums",
        title="How the kept pairs do",
        text="How many steps a pair stays on average; and the share of what the oracle, the attention that later "
        "queries give, or plain recency would keep that is kept here too. By chance it would be pairs / candidates."
        f"{_means(known)}",
        alt="Kept pairs by layer and key head.",
        table=Table(
            ["run", "layer", "key head", "pairs", "candidates", "stays, steps", "as the oracle", "as recency"], rows
        ),
    )


def _means(known: Sequence[tuple[str, KeptAnalysis]]) -> str:
    """The means over the key heads of each run that have to choose."""
    words = ""
    several = len({run for run, _ in known}) > 1
    for run in dict.fromkeys(run for run, _ in known):
        chosen = [kept for name, kept in known if name == run and len(kept.positions) < kept.candidates]
        oracle = [kept.overlap_oracle for kept in chosen if kept.overlap_oracle is not None]
        if oracle:
            chance = fmean(len(kept.positions) / kept.candidates for kept in chosen)
            words += f" {f'{run}, on' if several else 'On'} average: {fmean(oracle):.2f} of the oracle's, "
            words += f"by chance {chance:.2f}."
    return words


def _pairs_figure(drawn: list[dict[str, Any]]) -> Figure:
    runs, layers = (list(dict.fromkeys(row[name] for row in drawn)) for name in ("run", "layer"))
    told = ["position", "token", "score"] if sum(len(r["position"]) for r in drawn) <= MOST_TOLD else ["position"]
    rows = [
        [row["run"], row["layer"], row["key_head"], *pair]
        for row in drawn
        for pair in zip(row["position"], row["token"], row["score"], strict=False)
    ]
    count = len({row["key_head"] for row in drawn})
    words = f"Positions of {len(rows):,} kept pairs of {len(layers)} layers, from {spread_words([r[3] for r in rows])}."
    short = [{name: row[name] for name in ("run", "layer", "key_head", *told)} for row in drawn]
    chart = base(short).transform_filter(chosen("layer", "run")).transform_flatten(told)
    ticks = chart.mark_tick(thickness=2, color=VERMILLION, opacity=0.8, bandSize=max(14, 40 // count)).encode(
        x=alt.X("position:Q", title="position in the text"),
        y=alt.Y("key_head:O", title="key head"),
        tooltip=[f"{name}:{'N' if name == 'token' else 'Q'}" for name in told],
    )
    ticks = ticks.add_params(choice("choose_layer", "layer", layers), choice("choose_run", "of", runs))
    return Figure(
        key="kept_pairs",
        title="Which pairs are kept",
        text="A mark a pair that a key head holds at the end of the text; its token and score are under the pointer "
        "and in the table.",
        alt=words,
        table=Table(["run", "layer", "key head", "position", "token", "score"], rows),
        spec=finished(ticks, words, width="container", height=max(90, 45 * count)),
    )


def _shown(token: str) -> str:
    """A token with its spaces and ends of lines to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎")
