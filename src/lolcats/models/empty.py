"""Models without memory for their weights, from their configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lolcats.models.config import read_model_config
from lolcats.models.folder import demo_file, expand_model


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model on the meta device.

    Args:
        config: of the model, linearized or not.
        dtype: of its weights; None is what the configuration says, else float32.

    Raises:
        ValueError, KeyError, ImportError: transformers cannot make one of it.
    """
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def known_model(source: str) -> PreTrainedModel | None:
    """The empty model of whatever `load_teacher` takes, in float32; None where its configuration is not at hand."""
    try:
        source = expand_model(source)
        if source == "demo" or source.endswith(".gguf"):
            file = demo_file() if source == "demo" else Path(source)
            return empty_model(
                AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False), torch.float32
            )
        return empty_model(read_model_config(source), torch.float32)
    except (OSError, ValueError, KeyError, ImportError):
        return None
