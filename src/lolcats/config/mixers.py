"""The section `linearization`: the layer that replaces softmax attention, with a class of settings for each mixer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetPydanticSchema, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema
from typing_extensions import Self

from lolcats.config.fields import Near, Positive, Section, Width
from lolcats.config.split import LayerSplit, all_sizes, spread

DEFAULT = "hybrid"
"""The mixer of settings that name none, as all of version 0.1."""


class LinearizationConfig(Section):
    """What the settings of every mixer have. `LinearizationConfig(mixer=..., ...)` makes those of the mixer named."""

    around: ClassVar[frozenset[str]] = frozenset({"mixer", "layers", "start"})
    """Settings that are not about the layer itself."""
    by_layer: ClassVar[frozenset[str]] = frozenset()
    """Settings that are null or a list with an entry for each linearized layer."""

    mixer: str
    layers: Literal["all"] | list[int] | float = "all"  # indices (negative from the end), or a fraction in (0, 1]
    impl: Literal["auto", "triton", "chunked", "recurrent", "reference"] = "auto"

    def __new__(cls, **settings: Any) -> Self:
        """An object of the class of the mixer; an unknown one is left for the default's class to refuse."""
        kind = MIXERS.get(settings.get("mixer", DEFAULT), HybridConfig) if cls is LinearizationConfig else cls
        return super().__new__(kind)  # type: ignore[return-value]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @property
    def starts_from_text(self) -> bool:
        """Whether conversion needs a batch of text, from which the layers' parameters are set."""
        return False

    @property
    def learns_in_transfer(self) -> bool:
        """Whether a part of the layer learns in the first stage only, and is of no use without it."""
        return False

    @property
    def targets(self) -> tuple[str, ...]:
        """What `transfer.target` may compare."""
        return ("full",)

    @property
    def searches(self) -> bool:
        """Whether conversion looks in the text for how layers share the memory."""
        return False

    @property
    def most_pairs(self) -> int:
        """The largest number of pairs that a key head keeps."""
        return 0

    def values(self, place: int = 0) -> dict[str, Any]:
        """The settings of the layer itself, by name; `place` is its number among the linearized ones."""
        values = self.model_dump(exclude=set(self.around))
        return values | {name: values[name][place] for name in self.by_layer if values[name] is not None}

    def without_text(self) -> Self:
        """The same layers with a start that needs no text: for parameters that are replaced at once."""
        return self

    def facts(self) -> dict[str, str]:
        """What a table says of the layer: name -> text."""
        return {}

    def in_words(self) -> str:
        """What a text says of the layer, without a full stop."""
        return ", ".join(f"{name} {text}" for name, text in self.facts().items())

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


class HybridConfig(LinearizationConfig):
    """Softmax attention over a window and linear attention over the rest, with one denominator (the paper's layer)."""

    mixer: Literal["hybrid"] = "hybrid"  # type: ignore[assignment]  # a name of its own is what tells the classes
    feature_map: Literal["hedgehog", "t2r", "elu", "relu", "exp_dim"] = "hedgehog"
    feature_size: Width | None = None  # f, the width of the learned matrix; None is the head size
    window: Near = 64  # tokens with exact softmax attention
    window_kind: Literal["sliding", "terraced"] = "sliding"
    sinks: Near = 0  # first tokens of the text that always keep softmax attention
    fold: Annotated[int, Field(ge=1, le=2**10)] = 16  # keys that leave a sliding window before the sums are written
    state_heads: Literal["query", "kv"] = "query"  # one linear state per query head, or one per key/value head
    start: Literal["paper", "matched"] = "paper"
    decay: Literal["none", "gate"] = "none"  # gate: a learned, data-dependent scalar decay per head

    @property
    def targets(self) -> tuple[str, ...]:
        """The output, or the linear half's."""
        return ("full", "far")

    @property
    def starts_from_text(self) -> bool:
        """Whether the start is the matched one."""
        return self.start == "matched"

    def without_text(self) -> Self:
        """The same layers with the paper's start."""
        return self.model_copy(update={"start": "paper"})

    def facts(self) -> dict[str, str]:
        """Feature map and window."""
        size = "the head size" if self.feature_size is None else self.feature_size
        window = f"{self.window} tokens, {self.window_kind}, and {self.sinks} sinks"
        return {"feature map": f"{self.feature_map}, f = {size}", "window": window}

    def in_words(self) -> str:
        """All of the settings that make the layer."""
        size = "the size of a head" if self.feature_size is None else f"size {self.feature_size}"
        decay = ", and a learned decay" if self.decay == "gate" else ""
        return (
            f"Window of {self.window} tokens ({self.window_kind}), {self.sinks} sinks, feature map {self.feature_map} "
            f"of {size}, one linear state a {self.state_heads} head, {self.start} start{decay}"
        )

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.window_kind == "terraced" and self.window == 0:
            raise ValueError("a terraced window needs window >= 1; for no window use window_kind sliding")
        return self


class KeptConfig(Section):
    """The pairs of key and value that a layer keeps of those that left its window."""

    pairs: Near = 0  # for each key head
    score: Literal["learned", "self_recall", "recency", "random", "oracle"] = "learned"
    fade: Positive | None = (
        None  # tokens after which a score has fallen behind newer ones by a factor of e; null: never
    )
    mix: Annotated[float, Field(ge=0, le=1)] = 1.0  # weight of the largest attention, the rest is the sum's
    recall_error: bool = False  # learned: read also how badly the far half recalls a value


class BlendConfig(LinearizationConfig):
    """Softmax attention over sinks, window and kept pairs, and linear attention over all, joined by a learned share."""

    around: ClassVar[frozenset[str]] = LinearizationConfig.around | {"budget"}
    by_layer: ClassVar[frozenset[str]] = frozenset({"split"})

    mixer: Literal["blend"] = "blend"  # type: ignore[assignment]  # a name of its own is what tells the classes
    window: Annotated[int, Field(ge=1, le=2**17)] = 256  # tokens with exact softmax attention
    sinks: Near = 4  # first tokens of the text that always keep softmax attention
    kept: KeptConfig = Field(default_factory=KeptConfig)
    far: Literal["linear", "none", "simple_gla", "mamba2", "gla", "hgrn2", "delta", "gated_delta", "kda"] = "linear"
    rotate_far: bool = False  # give the far half q and k after rotary embedding
    feature_map: Literal["hedgehog", "t2r", "elu", "relu", "exp_dim"] = "hedgehog"
    feature_size: Width | None = None  # f, the width of the learned matrix; None is the head size
    state_heads: Literal["query", "kv"] = "kv"  # one far state per query head, or one per key/value head
    decay: Literal["none", "fixed", "gate"] = (
        "gate"  # of the far half (delta has none); gate: depends on the layer's input
    )
    state_dtype: Literal["float32", "bfloat16"] = "float32"  # of the far state; it is computed with in float32
    bits: Literal[16, 8, 4] = 16  # of the numbers of stored pairs: window, sinks and kept pairs
    start: Literal["plain", "matched"] = "plain"  # matched: the share of the far half, the channels of keys in few bits
    # Whether layers, or their key heads too, share the memory of window and kept.pairs as a batch of text asks for.
    budget: Literal["uniform", "layers", "heads"] = "uniform"
    split: LayerSplit | None = None  # what each has in the place of window and kept.pairs; null: found by the budget

    @property
    def targets(self) -> tuple[str, ...]:
        """The output, and where there is a far half its own or both parts."""
        return ("full",) if self.far == "none" else ("full", "far", "parts")

    @property
    def starts_from_text(self) -> bool:
        """Whether the start is the matched one, and there is something to match; or a split is to be found."""
        return self.searches or (self.start == "matched" and (self.far != "none" or self.bits == 4))

    @property
    def searches(self) -> bool:
        """Whether there is a budget to share and no split yet."""
        return self.budget != "uniform" and self.split is None

    @property
    def most_pairs(self) -> int:
        """The largest number of pairs that a key head keeps."""
        return self.kept.pairs if self.split is None else max(pairs for _, pairs in all_sizes(self.split))

    @property
    def learns_in_transfer(self) -> bool:
        """Whether kept pairs are chosen by a learned score."""
        return self.most_pairs > 0 and self.kept.score == "learned"

    def values(self, place: int = 0) -> dict[str, Any]:
        """See the base. With a split `kept.pairs` is the most that any key head of the model keeps.

        So each layer knows whether the model keeps pairs, though it may keep none itself.
        """
        values = super().values(place)
        return values | {"kept": values["kept"] | {"pairs": self.most_pairs}}

    def without_text(self) -> Self:
        """The same layers with the plain start; all alike where their split is not known yet."""
        budget = "uniform" if self.searches else self.budget
        return self.model_copy(update={"start": "plain", "budget": budget})

    def facts(self) -> dict[str, str]:
        """Near half, kept pairs and far half."""
        heads = "query" if self.state_heads == "query" else "key"
        sizes = [(self.window, self.kept.pairs)] if self.split is None else list(all_sizes(self.split))
        windows, pairs = (spread(list(numbers)) for numbers in zip(*sizes, strict=True))
        return {
            "near": f"window of {windows} tokens and {self.sinks} sinks, {self.bits} bits",
            "kept": f"{pairs} pairs per key head, score {self.kept.score}" if self.most_pairs else "no pairs",
            "far": "none" if self.far == "none" else f"{self.far}, one {self.state_dtype} state per {heads} head",
        }

    def in_words(self) -> str:
        """The same as one phrase, with what shares the budget where the sizes are not found yet."""
        near, kept, far = (self.facts()[name] for name in ("near", "kept", "far"))
        shared = f", shared out among {self.budget}" if self.searches else ""
        far = "no far half" if self.far == "none" else f"far half {far}"
        return f"{near[0].upper()}{near[1:]}, keeps {kept}{shared}, {far}"

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.decay == "none" and self.far not in ("linear", "none", "delta"):
            raise ValueError(f"far {self.far} has a decay; set decay to fixed or gate")
        if self.far == "linear" and self.decay == "none" and self.state_dtype == "bfloat16":
            raise ValueError("a far state without decay grows with the text, which bfloat16 cannot hold; set a decay")
        if self.most_pairs and self.kept.score == "learned" and self.kept.recall_error and self.far == "none":
            raise ValueError("kept.recall_error is the error of the far half, and far is none; set it to false")
        if self.most_pairs and self.kept.score == "self_recall" and self.far == "none":
            raise ValueError(
                "kept.score self_recall is the error of the far half, and far is none; choose another score"
            )
        return self


MIXERS: dict[str, type[LinearizationConfig]] = {
    "hybrid": HybridConfig,
    "blend": BlendConfig,
}
"""Name -> class of settings; the layers themselves are in `lolcats.mixers.registry`."""


def keyed_by_mixer(kinds: dict[str, type[LinearizationConfig]]) -> GetPydanticSchema:
    """What pydantic needs to read a section by its entry `mixer`; without one it is the default's."""

    def name_of(value: Any) -> Any:
        name = value.get("mixer", DEFAULT) if isinstance(value, dict) else getattr(value, "mixer", DEFAULT)
        return name if isinstance(name, str) else repr(name)

    def schema(_source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        names = ", ".join(sorted(kinds))
        return core_schema.tagged_union_schema(
            {name: handler(kind) for name, kind in kinds.items()},
            name_of,
            custom_error_type="unknown_mixer",
            custom_error_message=f"unknown mixer; expected mixer to be one of: {names}",
        )

    return GetPydanticSchema(schema)


AnyLinearization = Annotated[HybridConfig | BlendConfig, keyed_by_mixer(MIXERS)]
"""Type of the section in a run's settings."""


def mixer_settings(settings: Any) -> type[BaseModel]:
    """The class that a section `linearization` is read by, whose keys may be used in it."""
    name = settings.get("mixer", DEFAULT) if isinstance(settings, dict) else DEFAULT
    return MIXERS.get(name, MIXERS[DEFAULT]) if isinstance(name, str) else MIXERS[DEFAULT]
