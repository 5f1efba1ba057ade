"""What the steps of a stage read beside the sequences of the data: long texts in parts, and questions about facts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lolcats.config.fields import Positive, Section, Share, Width


class PassingConfig(Section):
    """State passing (arXiv 2507.02782): the last steps read long texts in parts, the state carried on detached."""

    share: Share = 0.0  # of the stage's steps, at its end
    chunks: Annotated[int, Field(ge=2, le=2**16)] = 4  # parts of a text, each of data.sequence_length tokens


class LogitsConfig(Section):
    """What the teacher predicts on sequences of the data, kept on disk so that its pass is paid once."""

    # topk: its k likeliest tokens at each position, found again by other runs; kl_factor then compares these, and all
    # other tokens as one class. none: the teacher reads along, and nothing is kept.
    cache: Literal["none", "topk"] = "none"
    k: Width = 64


class RecallConfig(Section):
    """Sequences that state facts and ask for them, many of both (arXiv 2609.16183)."""

    share: Share = 0.0  # of the sequences of each step


class TransferRecall(RecallConfig):
    """Of stage 1."""

    gap: Positive | None = None  # most tokens between a fact and its question; None is data.sequence_length


class FinetuneRecall(RecallConfig):
    """Of stage 2."""

    gap: Positive = 64  # tokens, as above, at the start; doubled whenever 90 % of the answers are right
