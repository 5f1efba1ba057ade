"""The settings of a run: pydantic models, strict YAML, and `key.sub=value` overrides.

Unknown keys and wrong types are errors. `configs/smollm2_135m.yaml` in the repository explains every key. Nothing here
imports torch, so that the command line can check settings at once.
"""

from lolcats.config.data import DataConfig, SourceConfig
from lolcats.config.load import (
    check_linearization,
    dotted,
    dump_config,
    explain,
    flat,
    load_config,
    merged,
    parse_overrides,
)
from lolcats.config.mixers import HybridConfig, LinearizationConfig
from lolcats.config.run import Control, EvaluationConfig, RunConfig
from lolcats.config.stages import FinetuneConfig, OptimConfig, TransferConfig

__all__ = [
    "Control",
    "DataConfig",
    "EvaluationConfig",
    "FinetuneConfig",
    "HybridConfig",
    "LinearizationConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "TransferConfig",
    "check_linearization",
    "dotted",
    "dump_config",
    "explain",
    "flat",
    "load_config",
    "merged",
    "parse_overrides",
]
