"""The fixtures of `shared.py`, for those processes that run tests.

The one that hands tests to the workers of pytest-xdist runs none: it does not wait for torch, transformers and peft.
"""

import importlib
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    if not importlib.import_module("torch").cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
    config.pluginmanager.register(importlib.import_module("shared"), "shared")
