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
    gc.disable()  # while a million objects are imported, none of which is garbage
    config.pluginmanager.register(importlib.import_module("shared"), "shared")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collections of garbage need not look through what is imported by now, which takes 0.3 s each time."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries of C++ complain of what is not freed at the end."""
    gc.unfreeze()
