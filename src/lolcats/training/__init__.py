"""Both training stages on one loop."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.models.sharded import is_sharded
from lolcats.models.vocabulary import check_token_ids
from lolcats.training.finetune import FinetuneStage
from lolcats.training.loop import train
from lolcats.training.parallel import ending_together, from_main_process
from lolcats.training.reading import check_reading
from lolcats.training.report import Reporter
from lolcats.training.stage import Stage, TrainingData, TrainResult
from lolcats.training.transfer import TransferStage

__all__ = [
    "FinetuneStage",
    "Reporter",
    "Stage",
    "TrainResult",
    "TrainingData",
    "TransferStage",
    "finetune_lora",
    "train",
    "transfer_attention",
]


def transfer_attention(
    model: PreTrainedModel,
    data: TrainingData,
    config: TransferConfig | None = None,
    *,
    folder: Path | None = None,
    reporter: Reporter | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> TrainResult:
    """Stage 1: train the feature maps and window factors of a converted model, in place; the best weights stay in it.

    Args:
        model: from `lolcats.convert`; its own weights do not change.
        data: sequences to train and validate on.
        config: settings; None is `TransferConfig()`.
        folder: where checkpoints live, and from which an interrupted stage goes on; None keeps none. A checkpoint says
            with which settings, data and weights the stage was begun, and is refused with others.
        reporter: where metrics go; None is silent.
        seed: order of the sequences.
        autocast: torch.bfloat16 for mixed precision.

    Raises:
        LolcatsError: the model is not converted, the loss or a weight is not finite, or a checkpoint does not fit.
    """
    stage = TransferStage(model, config or TransferConfig())
    result = _run(stage, stage.config, model, data, folder, reporter, seed, autocast)
    model.requires_grad_(False)
    return result


def finetune_lora(
    model: PreTrainedModel,
    data: TrainingData,
    config: FinetuneConfig | None = None,
    *,
    folder: Path | None = None,
    reporter: Reporter | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> tuple[TrainResult, PeftModel | None]:
    """Stage 2: low-rank (or full) fine-tuning of a converted model, in place; arguments as in `transfer_attention`.

    Returns:
        The outcome, and the model with its adapters where `config.merge` is False (None where they are merged).
    """
    stage = FinetuneStage(model, config or FinetuneConfig())
    result = _run(stage, stage.config, model, data, folder, reporter, seed, autocast)
    return result, stage.finish()


def _run(
    stage: Stage,
    config: TransferConfig | FinetuneConfig,
    model: PreTrainedModel,
    data: TrainingData,
    folder: Path | None,
    reporter: Reporter | None,
    seed: int,
    autocast: torch.dtype | None,
) -> TrainResult:
    for name, dataset in (("the training text", data.train), ("the validation text", data.validation)):
        check_token_ids(dataset.ids, model, name)
    check_reading(config, data, model, seed)
    cpu = model.device.type == "cpu"
    with ending_together(lambda: Accelerator(cpu=cpu)) as accelerator, tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(from_main_process(accelerator, lambda: temporary))
        return train(
            stage,
            config,
            data,
            place,
            reporter or Reporter(),
            accelerator=accelerator,
            seed=seed,
            autocast=autocast,
            sharded=is_sharded(model),
        )
