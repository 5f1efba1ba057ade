"""The fixtures of `shared.py`, for those processes that run tests.

The one that hands tests to the workers of pytest-xdist runs none: nobody waits until it has imported all.
"""

import importlib
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    config.pluginmanager.register(importlib.import_module("shared"), "shared")
