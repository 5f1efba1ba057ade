"""The sections `transfer` and `finetune`: the two stages of training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lolcats.config.curriculum import FinetuneRecall, PassingConfig, TransferRecall
from lolcats.config.fields import Count, Factor, Names, Positive, Rate, Rows, Section, Tokens, Width


class OptimConfig(Section):
    """The optimiser settings that both stages share."""

    _losses: ClassVar[tuple[str, ...]] = ()  # the weights of the stage's losses
    enabled: bool = True
    tokens: Tokens  # training tokens of the stage; see `steps`
    batch_size: Rows = 8  # sequences a step
    micro_batch_size: Rows | None = None  # sequences at once on the device; None is batch_size
    lr: Rate
    schedule: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of lr left at the end of cosine and linear
    warmup_steps: Count = 20
    weight_decay: Factor = 0.0
    clip: Rate = 1.0  # largest norm of the gradient
    validate_every: Positive = 100  # steps
    checkpoint_every: Positive = 100  # steps
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1  # plateau multiplies lr by this ...
    plateau_patience: Count = 2  # ... after this many validations without a gain
    compile: Literal["auto"] | bool = "auto"
    cuda_graph: bool = True  # on CUDA devices, record a step once and replay it

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        if self._losses and not any(getattr(self, name) for name in self._losses):
            raise ValueError(f"{' and '.join(self._losses)} are both 0; set at least one above 0")
        return self

    def steps(self, sequence_length: int) -> int:
        """Count the optimiser steps that read `tokens` tokens in sequences of `sequence_length`, rounded up."""
        return -(-self.tokens // (self.batch_size * sequence_length))


class TransferConfig(OptimConfig):
    """Stage 1, attention transfer: each layer learns to give the output of its own softmax attention."""

    _losses = ("mse_factor", "xent_factor")
    tokens: Tokens = 10_000_000
    lr: Rate = 1e-2
    mse_factor: Factor = 1000.0  # weight of the error of head outputs
    xent_factor: Factor = 0.0  # weight of the cross-entropy between attention weights (memory grows with length^2)
    target: Literal["hybrid", "linear"] = "hybrid"  # which output is compared: with the window, or the linear half
    recall: TransferRecall = Field(default_factory=TransferRecall)


class FinetuneConfig(OptimConfig):
    """Stage 2: the linearized model learns to predict text, by LoRA or with all weights."""

    _losses = ("cross_entropy_factor", "kl_factor")
    tokens: Tokens = 10_000_000
    lr: Rate = 1e-4
    method: Literal["lora", "full"] = "lora"
    rank: Width = 8
    alpha: Rate = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["attention", "all"] | Names = "attention"  # linear layers in linearized attention, all, or names
    train_feature_maps: bool = False
    cross_entropy_factor: Factor = 1.0  # weight of next-token cross-entropy
    kl_factor: Factor = 0.0  # weight of the divergence from the teacher's logits
    mask_prompt: bool = False  # count the loss only on responses
    merge: bool = True  # False: also keep the LoRA adapter apart, beside the artefact with merged weights
    passing: PassingConfig = Field(default_factory=PassingConfig)
    recall: FinetuneRecall = Field(default_factory=FinetuneRecall)

    @model_validator(mode="after")
    def _check_passing(self) -> Self:
        if self.passing.share and self.batch_size % self.passing.chunks:
            raise ValueError(
                f"passing.chunks {self.passing.chunks} must divide batch_size {self.batch_size}: a step reads the "
                "same number of tokens in longer texts"
            )
        return self
