"""Models without memory for their weights, from their configuration alone."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lolcats.models.config import read_model_config
from lolcats.models.folder import expand_model, gguf_file


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


def model_config(source: str) -> PretrainedConfig:
    """The configuration of whatever `load_teacher` takes; no weight is read.

    Raises:
        LolcatsError: see `read_model_config`; or the file of `demo` is not installed.
        OSError, ValueError, KeyError, ImportError: transformers cannot read a GGUF file.
    """
    source = expand_model(source)
    if (file := gguf_file(source)) is not None:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    return read_model_config(source)


def known_model(source: str) -> PreTrainedModel | None:
    """The empty model of whatever `load_teacher` takes, in float32; None where its configuration is not at hand."""
    try:
        return empty_model(model_config(source), torch.float32)
    except (OSError, ValueError, KeyError, ImportError):
        return None
