"""What is said where vLLM is missing or of another version."""

from __future__ import annotations

import pytest

from lolcats.errors import LolcatsError
from lolcats.serving import server
from lolcats.serving.vllm_plugin import version_refusal


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.1.dev3+cpu"])
def test_versions_that_serve(version: str) -> None:
    assert version_refusal(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "main"])
def test_versions_that_do_not(version: str) -> None:
    assert version_refusal(version) == (
        f"lolcats serves linearized models with vLLM from 0.32 up to before 0.33; {version} is installed"
    )


def test_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "installed_version", lambda: None)
    with pytest.raises(LolcatsError, match=r"vLLM is not installed; pip install 'lolcats\[vllm\]'.*transformers serve"):
        server.run_server("model", [])
