"""The fixtures of `shared.py`, for those processes that run tests.

The one that hands tests to the workers of pytest-xdist runs none: nobody waits until it has imported all.
"""

import gc
import importlib
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    config.pluginmanager.register(importlib.import_module("shared"), "shared")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now is a million objects, which each collection of garbage would look through: 0.3 s."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries of C++ complain of what is not freed at the end."""
    gc.unfreeze()
