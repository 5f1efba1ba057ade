"""`lolcats serve` where it cannot: one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lolcats.serving.vllm_plugin import installed_version


@pytest.mark.skipif(installed_version() is not None, reason="vLLM is installed")
def test_without_vllm(cli: Callable[..., Any]) -> None:
    """Whatever its options are: they are vLLM's."""
    answer = cli("serve", "model", "--port", "8000", "--no-such-option")
    answer.refused("vLLM is not installed; pip install 'lolcats[vllm]'")
