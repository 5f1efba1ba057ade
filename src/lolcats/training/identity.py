"""What a checkpoint belongs to: a digest of its data, and the settings of its stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lolcats.config import OptimConfig
from lolcats.data import PackedDataset
from lolcats.training.stage import Stage, TrainingData

DATA_TOKENS = 1 << 24
"""Tokens of a data set that are looked at: all of them where they lie in memory, else whole sequences spread evenly."""
BLOCK = 1024
"""Sequences that are read together."""


def identity(stage: Stage, config: OptimConfig, data: TrainingData) -> dict[str, Any]:
    """What must be the same when a stage goes on, as JSON: `settings`, `data` and `weights`."""
    origin = stage.origin()
    settings = {"linearization": origin["linearization"], stage.section: config.model_dump(mode="json")}
    return {"settings": json.loads(json.dumps(settings)), "data": data_digest(data), "weights": origin["weights"]}


def layer_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The linearization of a converted model."""
    return dict(getattr(model.config, "linearization", None) or {})


def data_digest(data: TrainingData) -> str:
    """Digest of the packed sequences."""
    digest = hashlib.sha256(f"{data.keep_apart}".encode())
    for part in (data.train, data.validation):
        _add_dataset(digest, part)
    return digest.hexdigest()


def _add_dataset(digest: Any, data: PackedDataset) -> None:
    count, length = data.ids.shape
    digest.update(f"{count} {length} ".encode())
    rows = np.unique(np.linspace(0, count - 1, min(count, max(1, DATA_TOKENS // length))).astype(np.int64))
    for begin in range(0, len(rows), BLOCK):
        some = data[rows[begin : begin + BLOCK]]
        for array, kind in ((some.ids, np.int32), (some.loss_mask, np.bool_), (some.document, np.int32)):
            digest.update(np.ascontiguousarray(array, kind).tobytes())


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities beside their settings, in words; what `saved` does not have is not compared.

    Checkpoints of early versions have nothing to compare.
    """
    words = {
        "data": "the text: its tokens, or the way they are packed, have changed",
        "weights": "the weights that the stage began with: the teacher's, or those that stage 1 left",
    }
    return [text for key, text in words.items() if key in saved and saved[key] != now[key]]
