"""Tests with the mark `gpu` are skipped where there is none; without a GPU Triton's interpreter is made faster."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def kernels_run_fast(fast_interpreter: None) -> None:
    """See `fast_interpreter`."""
