"""The sections `transfer` and `finetune`: the two stages of training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lolcats.config.blocks import BlocksConfig
from lolcats.config.curriculum import FinetuneRecall, LogitsConfig, PassingConfig, TransferRecall
from lolcats.config.fields import Count, Factor, Names, Near, Positive, Rate, Rows, Section, Share, Tokens, Width

WINDOW_STEP = 16
"""Random windows are multiples of it: kernels like few sizes."""
TARGETS = {"hybrid": "full", "linear": "far"}
"""Other names of `transfer.target`: those of version 0.1."""


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
    # On CUDA devices, record a step once and replay it; not with another window than the layer's.
    cuda_graph: bool = True
    # Each step has a window of [lowest, highest] tokens, a multiple of 16; null: always the layer's own.
    random_window: Annotated[list[Near], Field(min_length=2, max_length=2)] | None = None
    # Chance that a step has no window but the query's own key; a list has one for each of as many parts of the stage.
    window_dropout: Share | Annotated[list[Share], Field(min_length=1)] = 0.0

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} must divide batch_size {self.batch_size}")
        if self._losses and not any(getattr(self, name) for name in self._losses):
            raise ValueError(f"{', '.join(self._losses[:-1])} and {self._losses[-1]} are all 0; set one above 0")
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if self.random_window is not None and not self.windows:
            low, high = self.random_window
            raise ValueError(f"random_window [{low}, {high}]: expected [lowest, highest] with a multiple of "
                             f"{WINDOW_STEP} above 0 between them")  # fmt: skip
        if self.varies_window and self.compile is True:
            raise ValueError("compile true makes a program for each window that random_window and window_dropout give; "
                             "set compile to auto")  # fmt: skip
        return self

    @property
    def records_steps(self) -> bool:
        """Whether steps may be CUDA graphs."""
        return self.cuda_graph

    @property
    def windows(self) -> list[int]:
        """What `random_window` chooses from."""
        if self.random_window is None:
            return []
        low, high = self.random_window
        return list(range(max(1, -(-low // WINDOW_STEP)) * WINDOW_STEP, high + 1, WINDOW_STEP))

    @property
    def varies_window(self) -> bool:
        """Whether steps have other windows than the layer's own."""
        chances = self.window_dropout if isinstance(self.window_dropout, list) else [self.window_dropout]
        return self.random_window is not None or any(chances)

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
    # What is compared: hybrid or full the layer's output; linear or far the far half's, with all of the teacher's;
    # parts (blend) the far half's with the teacher's far output, and its share with the teacher's far attention.
    target: Literal["hybrid", "full", "linear", "far", "parts"] = "hybrid"
    recall: TransferRecall = Field(default_factory=TransferRecall)
    blocks: BlocksConfig = Field(default_factory=BlocksConfig)

    @property
    def compared(self) -> str:
        """The target by one name: "full", "far" or "parts"."""
        return TARGETS.get(self.target, self.target)

    @model_validator(mode="after")
    def _check_far_target(self) -> Self:
        if self.compared == "far" and self.varies_window:
            raise ValueError(f"target {self.target} is the far half alone, which random_window and window_dropout do "
                             "not change; leave them out")  # fmt: skip
        if self.compared == "parts" and self.xent_factor:
            raise ValueError("xent_factor compares attention weights, which target parts does not; set it to 0")
        return self


class ShardingConfig(Section):
    """How the weights of stage 2 lie in the memory of several processes."""

    # Each process holds a part of every decoder layer, and has one layer whole while it is computed (FSDP2).
    enabled: bool = False
    cpu_offload: bool = False  # the frozen parts wait in the memory of the CPU

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.cpu_offload and not self.enabled:
            raise ValueError("cpu_offload is for sharded weights; set enabled to true, or cpu_offload to false")
        return self


class FinetuneConfig(OptimConfig):
    """Stage 2: the linearized model learns to predict text, by LoRA or with all weights."""

    _losses = ("cross_entropy_factor", "kl_factor", "error_factor")
    tokens: Tokens = 10_000_000
    lr: Rate = 1e-4
    method: Literal["lora", "full"] = "lora"
    rank: Width = 8
    alpha: Rate = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Linear layers in linearized attention, all, all but those that make queries and keys, or names.
    targets: Literal["attention", "all", "no_qk"] | Names = "attention"
    train_feature_maps: bool = False
    cross_entropy_factor: Factor = 1.0  # weight of next-token cross-entropy
    kl_factor: Factor = 0.0  # weight of the divergence from the teacher's logits
    error_factor: Factor = 0.0  # weight of the squared error of the layers' attention outputs, from the teacher's
    mask_prompt: bool = False  # count the loss only on responses
    # Weight in the loss of the first tokens of a text, which see all of it in window and sinks.
    near_weight: Share = 1.0
    merge: bool = True  # False: also keep the LoRA adapter apart, beside the artefact with merged weights
    passing: PassingConfig = Field(default_factory=PassingConfig)
    recall: FinetuneRecall = Field(default_factory=FinetuneRecall)
    teacher_logits: LogitsConfig = Field(default_factory=LogitsConfig)
    # Write size and effective rank of each module's update, and the error of each layer, at each validation.
    lora_dynamics: bool = True
    gradient_checkpointing: bool = False  # compute each decoder layer twice, and keep only its input meanwhile
    sharding: ShardingConfig = Field(default_factory=ShardingConfig)

    @property
    def records_steps(self) -> bool:
        """Whether steps may be CUDA graphs, which hold nothing that is read from disk, nor what is computed twice."""
        twice = self.gradient_checkpointing or self.error_factor > 0
        return self.cuda_graph and self.teacher_logits.cache == "none" and not twice

    @property
    def follows_teacher(self) -> bool:
        """Whether a loss compares with the teacher, so that it reads along."""
        return self.kl_factor > 0 or self.error_factor > 0

    @model_validator(mode="after")
    def _check_logits(self) -> Self:
        if self.teacher_logits.cache != "none" and not self.kl_factor:
            raise ValueError(
                "teacher_logits keeps what kl_factor compares with, and kl_factor is 0; set it above 0, or "
                "teacher_logits.cache to none"
            )
        if self.teacher_logits.cache != "none" and self.error_factor:
            raise ValueError(
                "teacher_logits saves the teacher's pass in each step, and error_factor needs it for what its layers "
                "give; set error_factor to 0, or teacher_logits.cache to none"
            )
        if self.teacher_logits.cache != "none" and self.sharding.enabled and self.recall.share:
            raise ValueError(
                "with sharding the teacher reads in all processes at once, and sequences with questions, which "
                "teacher_logits does not have, are not in all; set recall.share to 0, or teacher_logits.cache to none"
            )
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.sharding.cpu_offload and self.method == "full":
            raise ValueError("sharding.cpu_offload is for frozen weights, and method full has none; use lora")
        if self.sharding.enabled and self.method == "full" and self.follows_teacher:
            raise ValueError(
                "sharding with method full and kl_factor or error_factor above 0 would need the teacher beside the "
                "model that is trained; set kl_factor to 0 and error_factor to 0, or use lora"
            )
        return self

    @model_validator(mode="after")
    def _check_passing(self) -> Self:
        if self.passing.share and self.batch_size % self.passing.chunks:
            raise ValueError(
                f"passing.chunks {self.passing.chunks} must divide batch_size {self.batch_size}: a step reads the "
                "same number of tokens in longer texts"
            )
        return self
