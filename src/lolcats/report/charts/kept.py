"""Which pairs are kept: where they stand in the text, which tokens they are, how long they stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import altair as alt

from lolcats.evaluation.analysis.file import KeptAnalysis
from lolcats.report.charts.theme import VERMILLION, base, choice, chosen, finished, thinned
from lolcats.report.figure import Figure, Table, spread_words
from lolcats.report.subject import Subject

MOST_TOLD = 60_000
"""Pairs up to which their scores are in the chart too."""
MOST_DRAWN = 250_000
"""Pairs in the chart; where there are more, every second layer is left out of it, or more of them."""
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
    rows = [
        [row["run"], row["layer"], row["key_head"], *pair]
        for row in drawn
        for pair in zip(row["position"], row["token"], row["score"], strict=False)
    ]
    count = len({row["key_head"] for row in drawn})
    words = f"Positions of {len(rows):,} kept pairs of {len(layers)} layers, from {spread_words([r[3] for r in rows])}."
    shown = thinned(layers, max(2, len(layers) * MOST_DRAWN // len(rows)))
    told = ["score"] if len(rows) <= MOST_TOLD else []
    ticks = _marks([row for row in drawn if row["layer"] in shown], told)
    ticks = ticks.mark_tick(thickness=2, color=VERMILLION, opacity=0.8, bandSize=max(14, 40 // count)).encode(
        x=alt.X("position:Q", title="position in the text"),
        y=alt.Y("key_head:O", title="key head"),
        tooltip=["position:Q", "token:N", *(f"{name}:Q" for name in told)],
    )
    ticks = ticks.add_params(choice("choose_layer", "layer", shown), choice("choose_run", "of", runs))
    left_out = f" The chart has {len(shown)} of {len(layers)} layers." if len(shown) < len(layers) else ""
    return Figure(
        key="kept_pairs",
        title="Which pairs are kept",
        text="A mark a pair that a key head holds at the end of the text. Under the pointer is its token"
        f"{' and score' if told else ''}; tokens and scores of all are in the file of the numbers.{left_out}",
        alt=words,
        table=Table(["run", "layer", "key head", "position", "token", "score"], rows),
        spec=finished(ticks, words, width="container", height=max(90, 45 * count)),
    )


def _marks(drawn: list[dict[str, Any]], told: list[str]) -> alt.Chart:
    """A row a pair of what is chosen; on the page a position is its distance from the one before, which is short."""
    packed = []
    texts, text_of = _texts(drawn)
    for row in drawn:
        pairs = sorted(zip(row["position"], row["token"], row["score"], strict=False))
        steps = [pairs[0][0], *(later[0] - pair[0] for pair, later in pairwise(pairs))]
        packed.append(
            {name: row[name] for name in ("run", "layer", "key_head")} | {"step": steps, "text": text_of[row["run"]]}
        )
        packed[-1] |= {name: [pair[-1] for pair in pairs] for name in told}
    return (
        base(packed)
        .transform_filter(chosen("layer", "run"))
        .transform_flatten(["step", *told])
        .transform_window(position="sum(step)", groupby=["key_head"], frame=[None, 0])
        .transform_calculate(token="tokens[datum.text][datum.position]")
        .add_params(alt.param(name="tokens", value=texts))
    )


def _texts(drawn: list[dict[str, Any]]) -> tuple[list[dict[str, str]], dict[str, int]]:
    """The texts, position -> token, and the number of that of each run: runs that were analysed alike have the same."""
    texts: list[dict[str, str]] = []
    text_of: dict[str, int] = {}
    for run in dict.fromkeys(row["run"] for row in drawn):
        rows = [row for row in drawn if row["run"] == run]
        own = {str(p): t for row in rows for p, t in zip(row["position"], row["token"], strict=False)}
        alike = (n for n, text in enumerate(texts) if all(text.get(p, t) == t for p, t in own.items()))
        text_of[run] = next(alike, len(texts))
        if text_of[run] == len(texts):
            texts.append({})
        texts[text_of[run]].update(own)
    return texts, text_of


def _shown(token: str) -> str:
    """A token with its spaces and ends of lines to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎")
