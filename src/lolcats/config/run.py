"""The settings of a whole run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from lolcats.config.data import DataConfig
from lolcats.config.fields import Length, Positive, Rows, Section, Seed
from lolcats.config.mixers import AnyLinearization, HybridConfig
from lolcats.config.stages import FinetuneConfig, TransferConfig
from lolcats.variants import CONTROLS, TRAINED_WINDOW


def _check_control(name: str) -> str:
    if name not in CONTROLS:
        raise ValueError(f"unknown control; expected {', '.join(CONTROLS)}")
    return name


Control = Annotated[str, AfterValidator(_check_control)]
"""The name of a control, as settings hold it."""


def _as_list(value: object) -> object:
    # As in transformers, one name may stand for itself, and "none" for no tracker.
    names = [] if value == "none" else [value] if isinstance(value, str) else value
    return list(dict.fromkeys(names)) if isinstance(names, list) else names


class EvaluationConfig(Section):
    """What is measured after training."""

    sources: list[str] = Field(default=[])  # empty: the held-out validation sequences
    segment_length: Length | None = None  # tokens; None is data.sequence_length
    last: Positive | None = None  # count only the last tokens of a segment; None counts all
    max_segments: Positive | None = None
    batch_size: Rows = 4  # segments at once
    controls: list[Control] = Field(default=list(CONTROLS))  # trained_window costs as much as stage 2


class RunConfig(Section):
    """A whole run: model, layer, data, both stages and evaluation."""

    model: str = "demo"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = (
        "run"  # the folder of the run inside runs_dir
    )
    runs_dir: str = "runs"
    seed: Seed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"  # of the teacher's linear layers while training
    # Trackers that show the scalars of metrics.jsonl while stages are trained.
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_as_list)] = Field(default=[])
    linearization: AnyLinearization = Field(default_factory=HybridConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @property
    def trains_window(self) -> bool:
        """Whether the control `trained_window` is asked for, and there is a stage 2 that it can get too."""
        return self.finetune.enabled and TRAINED_WINDOW in self.evaluation.controls

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        if self.quantization != "none" and self.finetune.enabled and self.finetune.method == "full":
            raise ValueError(f"finetune.method full cannot train weights of {self.quantization}; use lora")
        return self

    @model_validator(mode="after")
    def _check_sharding(self) -> Self:
        if self.finetune.sharding.enabled and self.quantization == "8bit":
            raise ValueError("quantization 8bit cannot be sharded (finetune.sharding); use 4bit or none")
        if self.finetune.sharding.enabled and "self" in self.data.source_names:
            raise ValueError("data.sources self is written by one process, which has no whole model if "
                             "finetune.sharding is enabled; name other text, or write it in a run without")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        if self.linearization.learns_in_transfer and not self.transfer.enabled:
            raise ValueError(
                "linearization.kept.score learned is trained in the first stage, and transfer.enabled is false; enable "
                "it, or choose another score"
            )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        layer, stage = self.linearization, self.transfer
        if stage.enabled and stage.compared not in layer.targets:
            far = ", far none" if getattr(layer, "far", None) == "none" else ""
            raise ValueError(f"transfer.target {stage.target}: the layer {layer.mixer}{far} has none; expected one "
                             f"of {', '.join(layer.targets)}")  # fmt: skip
        return self

    @field_validator("linearization", "data", "transfer", "finetune", "evaluation", mode="before")
    @classmethod
    def _read_empty_section(cls, value: object) -> object:
        # YAML reads a section whose keys are all commented out as null.
        return {} if value is None else value
