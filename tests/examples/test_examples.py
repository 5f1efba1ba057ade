"""The scripts of examples/: a run by a queue, and one on two nodes, with the same results."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import preloaded
from faults.cases import SETTINGS, nested
from tiny import SENTENCE, chat_tokenizer, save_teacher

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(file for file in EXAMPLES.rglob("*") if file.suffix in (".sh", ".sbatch"))
BLOCKS = 2
SBATCH = """#!/usr/bin/env bash
# A queue in which everything runs at once: an array one task after the other.
set -euo pipefail
echo "$@" >> queued
array=0
while [[ $1 == --* ]]; do
    if [[ $1 == --array=* ]]; then array=${1#--array=}; fi
    shift
done
job=$(wc -l < queued)
array=${array%\\%*}
for task in $(seq "${array%-*}" "${array#*-}"); do
    SLURM_JOB_ID=$job SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here \\
        bash "$@" >> "job-$job.log" 2>&1
done
echo "$job"
"""
"""A small stand-in for SLURM's commands, by name."""
SLURM = {
    "sbatch": SBATCH,
    "srun": '#!/usr/bin/env bash\nexec "$@"\n',
    "scontrol": "#!/usr/bin/env bash\necho localhost\n",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_scripts_are_bash(script: Path) -> None:
    """And each says how it is started, in its second or its first comment."""
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert re.search(rf"^# .*{re.escape(script.name)} CONFIG", script.read_text(), re.M)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model, a text and settings."""
    place = tmp_path_factory.mktemp("examples")
    save_teacher(place / "teacher", chat_tokenizer(), layers=BLOCKS)
    (place / "text.txt").write_text(SENTENCE * 40)
    for name in ("slurm", "torchrun"):
        own = {"model": str(place / "teacher"), "data.sources": [str(place / "text.txt")], "transfer.blocks.size": 1}
        settings = {**SETTINGS, **own, "runs_dir": str(place), "name": name, "evaluation.controls": []}
        (place / f"{name}.yaml").write_text(json.dumps(nested(settings)))
    return place


@pytest.fixture(scope="module")
def variables(place: Path) -> Iterator[dict[str, str]]:
    """Of shells whose programs are started without importing anything."""
    server, found = preloaded.start(place)
    for name, text in SLURM.items():
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    yield {**found, "LOLCATS_CACHE": str(place / "cache"), "GPUS": "1"}
    server.kill()


@pytest.fixture(scope="module")
def queue(place: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A whole run by the jobs of a queue."""
    command = ["bash", EXAMPLES / "slurm" / "submit.sh", "slurm.yaml", str(BLOCKS), "finetune.lr=0.001"]
    return subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_a_queue_does_a_whole_run(place: Path, queue: subprocess.CompletedProcess[str]) -> None:
    logs = "".join(file.read_text() for file in sorted(place.glob("job-*.log")))
    assert not queue.returncode, queue.stderr + logs
    assert queue.stdout.split() == ["prepare", "1,", "blocks", "2,", "stitch", "3,", "stage", "2", "4"]
    queued = (place / "queued").read_text().splitlines()
    assert [re.findall(r"--(?:dependency|array)=\S+|\w+\.sbatch", line) for line in queued] == [
        ["prepare.sbatch"],
        ["--dependency=afterok:1", f"--array=0-{BLOCKS - 1}%8", "block.sbatch"],
        ["--dependency=afterok:2", "stitch.sbatch"],
        ["--dependency=afterok:3", "finetune.sbatch"],
    ]
    assert json.loads((place / "slurm" / "results.json").read_text())["complete"], logs
    assert (place / "slurm" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("queue")
def test_two_nodes_do_a_whole_run(place: Path, variables: dict[str, str]) -> None:
    """Two launchers, which find each other, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = {**variables, "HEAD": f"localhost:{port}", "ADDRESS": "127.0.0.1", "NODES": "2"}
    command = ["bash", EXAMPLES / "torchrun" / "launch.sh", "torchrun.yaml", "finetune.lr=0.001"]
    nodes = []
    for number in range(2):
        with (place / f"node-{number}.log").open("w") as log:
            nodes.append(subprocess.Popen(command, cwd=place, env=node, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=200) for process in nodes]
    finally:
        for process in nodes:
            process.kill()
            process.wait()
    said = "".join((place / f"node-{number}.log").read_text() for number in range(2))
    assert codes == [0, 0], said
    assert json.loads((place / "torchrun" / "results.json").read_text())["complete"], said
    first, second = (
        load_file(place / name / "checkpoints" / "transfer" / "best.safetensors") for name in ("slurm", "torchrun")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "as the queue's, to the byte"
