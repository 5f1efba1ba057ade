"""What the sections of a configuration are made of, and the section `data`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)


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
Names = Annotated[list[str], Field(min_length=1)]
TemplateName = Literal["plain", "alpaca", "chat"]


class Section(BaseModel):
    """A group of settings: unknown keys, wrong types and infinities are errors, also on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, strict=True, allow_inf_nan=False)


class SourceConfig(Section):
    """A source of text with settings of its own; what is None follows the data set's recipe, or the section `data`."""

    name: str  # what a source without settings is called by
    weight: Rate | None = None  # share of the mixture in tokens, relative to the other weights
    template: TemplateName | None = None
    limit: Tokens | None = None  # records read, from the beginning; samples made by "passkey" and "self"
    validation: Count | None = None  # the first so many records are the held-out ones
    columns: dict[str, str] = {}  # "instruction" (or text, output, ...) -> what the data set calls it
    revision: str | None = None  # of a data set of the hub
    streaming: bool | None = None  # of a data set of the hub: rows are fetched as they are read
    length: Length | None = None  # "passkey" and "self": tokens a sample; None: sequence_length

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}


class DataConfig(Section):
    """What is read, how records become text, and how text becomes sequences of tokens."""

    # What `lolcats.data.iter_records` takes, "passkey", "self", or token files; with settings: see SourceConfig.
    sources: Annotated[list[str | SourceConfig], Field(min_length=1)] = ["python-docs"]
    local: dict[str, str] = {}  # name of a data set -> file or folder that is read in its place
    template: Literal["auto"] | TemplateName = "auto"  # auto: the data set's own, else plain
    sequence_length: Length = 1024  # tokens
    packing: Literal["stream", "documents"] = "stream"
    validation_sequences: Positive = 16
    max_tokens: Tokens | None = None  # stop reading after this many tokens

    @field_validator("sources", mode="before")
    @classmethod
    def _read_one_source(cls, value: object) -> object:
        return [value] if isinstance(value, str | dict | SourceConfig) else value

    @property
    def source_names(self) -> list[str]:
        """The sources by name, without their settings."""
        return [source if isinstance(source, str) else source.name for source in self.sources]
