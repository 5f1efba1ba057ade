"""Triton's interpreter where there is no GPU; which files come first; and what tests cost.

`--cpu-times N` shows it of each folder and of the N slowest tests.
"""

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, as transformers does at once

# Those that take longest, so that two workers end at about the same time; the others as they are collected.
FIRST = (
    "tests/faults/", "tests/models/test_demo.py", "tests/ops/test_kernels", "tests/ops/test_near_kernels.py",
    "tests/sweep/", "tests/runs/test_recipe.py", "tests/modeling/test_families.py", "tests/cli/test_sweep.py",
    "tests/training/",
)  # fmt: skip

seconds: Counter[str] = Counter()  # of each test, with its fixtures and the processes that it waited for
last = [0.0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", type=int, metavar="N", help="CPU seconds of each folder and of the N slowest tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST)))


def pytest_runtest_logstart() -> None:
    last[0] = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    before, last[0] = last[0], sum(os.times()[:4])
    report.user_properties.append(("cpu_seconds", last[0] - before))  # thus the workers of pytest-xdist tell it
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    spent: Any = dict(report.user_properties).get("cpu_seconds", 0.0)
    seconds[report.nodeid] += spent


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (count := config.getoption("--cpu-times")) is not None:
        folders: Counter[str] = Counter()
        for test, spent in seconds.items():
            folders[os.path.dirname(test.split("::")[0])] += spent
        for name, spent in [*folders.most_common(), ("all", sum(seconds.values())), *seconds.most_common(count)]:
            terminalreporter.write_line(f"{spent:8.1f} s of CPU time  {name}")
