"""The section `data`: what is read, and how it becomes sequences of tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from lolcats.config.fields import Count, Length, Positive, Rate, Section, TemplateName, Tokens


class SourceConfig(Section):
    """A source of text with settings of its own; what is None follows the data set's recipe, or the section `data`."""

    name: str  # what a source without settings is called by
    weight: Rate | None = None  # share of the mixture in tokens, relative to the other weights
    template: TemplateName | None = None
    limit: Tokens | None = None  # records read, from the beginning; samples made by "passkey" and "self"
    validation: Count | None = None  # the first so many records are the held-out ones
    columns: dict[str, str] = Field(default={})  # "instruction" (or text, output, ...) -> what the data set calls it
    revision: str | None = None  # of a data set of the hub
    streaming: bool | None = None  # of a data set of the hub: rows are fetched as they are read
    length: Length | None = None  # "passkey" and "self": tokens a sample; None: sequence_length

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}


class DataConfig(Section):
    """What is read, how records become text, and how text becomes sequences of tokens."""

    # What `lolcats.data.iter_records` takes, "passkey", "self", or token files; with settings: see SourceConfig.
    sources: Annotated[list[str | SourceConfig], Field(min_length=1)] = Field(default=["python-docs"])
    local: dict[str, str] = Field(default={})  # name of a data set -> file or folder that is read in its place
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
