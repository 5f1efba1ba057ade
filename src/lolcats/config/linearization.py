"""The section `linearization`: the layer that replaces softmax attention."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from lolcats.config.fields import Near, Section, Width


class LinearizationConfig(Section):
    """The attention layer that replaces softmax attention, and the layers that get it."""

    feature_map: Literal["hedgehog", "t2r", "elu", "relu", "exp_dim"] = "hedgehog"
    feature_size: Width | None = None  # f, the width of the learned matrix; None is the head size
    window: Near = 64  # tokens with exact softmax attention
    window_kind: Literal["sliding", "terraced"] = "sliding"
    sinks: Near = 0  # first tokens of the text that always keep softmax attention
    state_heads: Literal["query", "kv"] = "query"  # one linear state per query head, or one per key/value head
    layers: Literal["all"] | list[int] | float = "all"  # indices (negative from the end), or a fraction in (0, 1]
    impl: Literal["auto", "triton", "chunked", "recurrent", "reference"] = "auto"
    start: Literal["paper", "matched"] = "paper"
    decay: Literal["none", "gate"] = "none"  # gate: a learned, data-dependent scalar decay a head

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: object) -> object:
        value = list(value) if isinstance(value, tuple | range) else value
        if value == "all" or (isinstance(value, float) and 0 < value <= 1):
            return value
        # A bare 1 could mean "all of them" or "layer 1", so whole numbers are only taken inside a list.
        if not isinstance(value, list) or any(type(index) is not int for index in value):
            raise ValueError('expected "all", a list of layer indices, or a fraction above 0 and up to 1.0')
        if not value or len(set(value)) < len(value):
            raise ValueError("a list of layers needs at least one index, and each index once")
        return value

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.window_kind == "terraced" and self.window == 0:
            raise ValueError("a terraced window needs window >= 1; for no window use window_kind sliding")
        return self
