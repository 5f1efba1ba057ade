"""benchmarks/studies.py: the studies as one sweep, and their tables from its results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lolcats.sweep import load_sweep

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.fixture(scope="module")
def studies() -> ModuleType:
    spec = importlib.util.spec_from_file_location("studies", ROOT / "benchmarks" / "studies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_run_is_done_once(studies: ModuleType, tmp_path: Path) -> None:
    sweeps = [load_sweep(path) for path in FILES]
    studies.combine(tmp_path, sweeps)
    joint = load_sweep(tmp_path / "studies.yaml")
    where = json.loads((tmp_path / "studies.json").read_text())
    configs = {run.name: studies.settings(run.config) for run in joint.runs}
    assert len({json.dumps(config, sort_keys=True) for config in configs.values()}) == len(configs)
    for sweep in sweeps:
        for run in sweep.runs:
            assert configs[where[sweep.name][run.name]] == studies.settings(run.config)
    assert where["window"]["window-64"] == where["lora-rank"]["r8"] == where["components"]["hedgehog-both"]
    assert joint.measure.controls == ["window_only"] and "mmlu" in joint.measure.tasks


def test_tables(studies: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"perplexity.teacher": 20.0, "perplexity.student": 31.234, "kl.student": 0.5, "piqa.acc": 0.666,
               "piqa.acc.window_only": 0.6, "tasks.average": 0.666, "tasks.average.window_only": 0.6,
               "passkey.512": 1.0, "passkey.1024": 0.1}  # fmt: skip
    results = {
        "runs": [{"name": "a", "columns": columns}],
        "teachers": [{"name": "teacher", "columns": {"piqa.acc": 0.7}}],
    }
    (tmp_path / studies.SWEEP).mkdir()
    (tmp_path / studies.SWEEP / "results.json").write_text(json.dumps(results))
    (tmp_path / "studies.json").write_text(json.dumps({"window": {"window-64": "a", "window-4": "b"}}))
    studies.tables(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    heads = "| run | after transfer | student | KL | window only | piqa | average | average, window_only |"
    assert lines[3] == heads + " passkey 512, 1024 |"
    assert lines[5] == "| window-64 |  | 31.23 | 0.50 |  | 66.6 | 66.6 | 60.0 | 100, 10 |"
    assert lines[6] == "| window-4 |  |  |  |  |  |  |  |  |"
    assert lines[7] == "| teacher |  | 20.00 |  |  | 70.0 |  |  |  |"
