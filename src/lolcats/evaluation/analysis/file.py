"""analysis.json: what was found inside a model, as typed sections, each of which may be missing.

The numbers of `layers`, `kept` and `attention` are of the model as it is: its layers read what the teacher's layers
read, with their own projections, adapters merged, and are compared with the teacher's softmax attention. Shares are
means over the queries that have keys beyond window and sinks, and null where there are none.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lolcats.errors import LolcatsError, first_problem
from lolcats.files import read_json_object, write_json

VERSION = 1
FILE, MAPS = "analysis.json", "analysis.npz"
"""Names in the folder of a run or of a model."""
ANEW = "delete it and make it anew: lolcats report"

Number = float | None
"""None is a number that is not known, does not exist here, or was not finite."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class AnalysedText(_Section):
    """The text that was read."""

    source: str
    segments: int
    length: int
    """Tokens of a segment."""


class HeadAnalysis(_Section):
    """One query head."""

    head: int
    key_head: int
    error: Number = None
    """Mean squared error of its output, before the output projection."""
    relative_error: Number = None
    """The same, divided by the mean square of the teacher's output."""
    entropy: Number = None
    """Of the teacher's attention, nats, mean over queries."""
    far_share_teacher: Number = None
    """The teacher's attention to keys that are in neither window nor sinks of this head."""
    far_share_student: Number = None
    """`kept_share` and `share` together, 0 where there is neither."""
    kept_share: Number = None
    """Weight of the kept pairs; None for a head without them."""
    share: Number = None
    """Weight of the far half: lambda of `blend`, the linear half's part of the denominator of `hybrid`; or None."""
    window: int | None = None
    sinks: int | None = None
    pairs: int | None = None
    decay: Number = None
    """What is left of the far half's state from one token to the next: mean factor; None without decay."""
    window_factor: Number = None
    """The factor g of `hybrid`'s softmax half, 0 to 1."""


class LayerAnalysis(_Section):
    """One layer; of one that keeps softmax attention only its number."""

    layer: int
    linearized: bool
    error: Number = None
    """Mean squared error of the attention output before the output projection, on the teacher's stream."""
    relative_error: Number = None
    """The same, divided by the mean square of the teacher's output."""
    error_before: Number = None
    """That of the training-free start on the teacher's weights."""
    error_transfer: Number = None
    """That of the layers as stage 1 left them, on the teacher's weights; None where that is not known."""
    entropy: Number = None
    """Of the teacher's attention, nats, mean over heads and queries."""
    heads: list[HeadAnalysis] = []


class KeptAnalysis(_Section):
    """The pairs that a key head keeps of the first segment."""

    layer: int
    key_head: int
    positions: list[int]
    """At the end of the text, ascending."""
    tokens: list[str]
    scores: list[Number]
    candidates: int
    """Keys that had left the window by the end: a choice by chance overlaps with any other in len(positions) of
    them."""
    stay_mean: Number = None
    """Queries for which a pair that was kept at all stayed, mean; up to the end for those that are still there."""
    overlap_oracle: Number = None
    """Share of what the score "oracle" keeps at the end that is kept here too."""
    overlap_recency: Number = None


class AttentionText(_Section):
    """A text of the maps."""

    name: str
    tokens: list[str]
    """The text of each cell: one token, or several where the text is pooled."""
    length: int
    """Tokens of the text."""
    cell: int
    """Tokens of a cell; the last one may have fewer."""


class AttentionSection(_Section):
    """What is in the file of maps, see `lolcats.evaluation.analysis.maps`."""

    file: str
    digest: str
    """SHA-256 of the file."""
    texts: list[AttentionText]
    layers: list[int]
    heads: list[int]


class Generation(_Section):
    """What teacher and student write after a prompt, always the likeliest token."""

    prompt: str
    teacher: str
    student: str
    first_difference: int | None = None
    """Number of the first token that differs, from 0; None where there is none."""
    tokens_teacher: list[str]
    tokens_student: list[str]


class LoraModule(_Section):
    """The update scale B A of one linear layer at some steps of stage 2."""

    layer: int
    projection: str
    steps: list[int]
    norm: list[Number]
    """Frobenius norm."""
    effective_rank: list[Number]
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""


class LoraSection(_Section):
    """What stage 2 changed."""

    modules: list[LoraModule] = []
    layers: list[int] = []
    """Of the lists below, in their order."""
    error_before_lora: list[Number] = []
    """`error_transfer` of the linearized layers; empty where it is not known."""
    error_after_lora: list[Number] = []
    """`error` of the linearized layers."""


class Analysis(_Section):
    """All sections."""

    version: int = VERSION
    model: str
    """What was analysed."""
    teacher: str | None = None
    """What it was compared with; None: with softmax attention on its own weights."""
    date: str
    device: str
    dtype: str
    text: AnalysedText | None = None
    layers: list[LayerAnalysis] | None = None
    kept: list[KeptAnalysis] | None = None
    attention: AttentionSection | None = None
    generations: list[Generation] | None = None
    lora: LoraSection | None = None
    notes: dict[str, str] = Field(default={})
    """What could not be found out, and why."""


def read_analysis(folder: Path) -> Analysis | None:
    """The analysis in the folder of a run or model, None where there is none.

    Raises:
        LolcatsError: it cannot be read, is of a later version, or is not what is written there.
    """
    file = folder / FILE
    content = read_json_object(file, ANEW)
    if not content:
        return None
    if isinstance(version := content.get("version"), int) and version > VERSION:
        raise LolcatsError(f"{file} is of version {version} and this one reads up to {VERSION}; {ANEW}")
    try:
        return Analysis.model_validate(content)
    except (ValidationError, RecursionError, OverflowError) as error:
        raise LolcatsError(f"{file} cannot be used: {first_problem(error)}; {ANEW}") from error


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Replace analysis.json of a folder, in which every number is finite or null; raises as `atomic_file` does."""
    write_json(folder / FILE, analysis.model_dump(mode="json"))
