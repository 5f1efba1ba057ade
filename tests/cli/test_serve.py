"""`lolcats serve` where it cannot: one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from lolcats.cli.failures import describe
from lolcats.errors import LolcatsError
from lolcats.serving.vllm_plugin import installed_version


@pytest.mark.skipif(installed_version() is not None, reason="vLLM is installed")
def test_without_vllm(cli: Callable[..., Any]) -> None:
    """Whatever its options are: they are vLLM's."""
    answer = cli("serve", "model", "--port", "8000", "--no-such-option")
    answer.refused("vLLM is not installed; pip install 'lolcats[vllm]'")


def test_a_refusal_of_a_whole_object_is_a_line() -> None:
    """vLLM's settings are objects of pydantic, within which the plugin refuses a model."""

    class Settings(BaseModel):
        @model_validator(mode="after")
        def refuse(self) -> Settings:
            raise LolcatsError("a linearized model cannot be served so")

    with pytest.raises(ValidationError) as caught:
        Settings()
    assert describe(caught.value) == "a linearized model cannot be served so"
