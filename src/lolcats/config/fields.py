"""What the sections of a configuration are made of: kinds of numbers, and their base class."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: object) -> object:
    # 1e7, the usual way to write a token count, is a float in YAML.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


# Upper bounds are far above what anybody trains with; beyond them a typing error would fill the memory without a word.
Tokens = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**14)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Rows = Annotated[int, Field(ge=1, le=2**16)]  # of a batch
Length = Annotated[int, Field(ge=2, le=2**24)]  # of a sequence, in tokens
Near = Annotated[int, Field(ge=0, le=2**17)]  # tokens that keep exact attention
Width = Annotated[int, Field(ge=1, le=2**16)]  # of a learned matrix
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what numpy takes
Factor = Annotated[float, Field(ge=0, le=3e38)]  # as large as float32 goes
Rate = Annotated[float, Field(gt=0, le=3e38)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[str], Field(min_length=1)]
TemplateName = Literal["plain", "alpaca", "chat"]


class Section(BaseModel):
    """A group of settings: unknown keys, wrong types and infinities are errors, also on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)
