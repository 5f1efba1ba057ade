"""One process of several that fails, is killed or interrupted ends the others, soon and with its message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import forked

SCRIPT = """
import os, signal, socket, sys, time

import torch
import torch.distributed
from accelerate import Accelerator

from lolcats.errors import LolcatsError
from lolcats.training.parallel import check_same, ending_together, from_main_process

torch.set_num_threads(1)


def waits(accelerator):
    accelerator.reduce(torch.ones(1), "sum")  # for a process that never comes


def fails(accelerator):
    raise LolcatsError("the river is dry")


def breaks(accelerator):
    raise KeyError("no such stone")


def dies(accelerator):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupts(accelerator):
    raise KeyboardInterrupt


def idles(accelerator):
    time.sleep(100)


def agrees(accelerator):
    assert from_main_process(accelerator, lambda: accelerator.process_index) == 0
    check_same(accelerator, "same", "the data")
    time.sleep(2 * accelerator.process_index)  # longer than a look at the others takes


def differs(accelerator):
    check_same(accelerator, str(accelerator.process_index), "the data")


def main_breaks(accelerator):
    from_main_process(accelerator, lambda: {}["stone"])


SCENES = {
    "other_fails": (waits, fails), "main_fails": (fails, waits), "other_breaks": (idles, breaks),
    "other_dies": (idles, dies), "main_dies": (dies, idles), "dies_in_exchange": (waits, dies),
    "interrupted": (interrupts, waits), "agree": (agrees, agrees), "differ": (differs, differs),
    "main_breaks": (main_breaks, main_breaks),
    "other_never_comes": (waits, dies), "main_never_comes": (dies, waits),
    "other_dies_at_start": (waits, dies), "main_dies_at_start": (dies, waits), "other_fails_at_start": (waits, fails),
    "named_by_accelerate": (waits, dies),
}
ABSENT = {("other_never_comes", 1), ("main_never_comes", 0)}


def begin(name, rank):
    # An accelerator, in whose start the processes wait for each other.
    if name.endswith("_at_start") and SCENES[name][rank] is not waits:
        SCENES[name][rank](None)
    return Accelerator(cpu=True)


def child(name, rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"}
    output = os.open(f"{sys.argv[1]}/{name}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["LOLCATS_MEETING_SECONDS"] = "6"
    if name == "named_by_accelerate":  # on the CPU it does without
        del os.environ["LOCAL_RANK"]
    try:
        if (name, rank) in ABSENT:
            os.kill(os.getpid(), signal.SIGKILL)
        with ending_together(lambda: begin(name, rank)) as accelerator:
            SCENES[name][rank](accelerator)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def play(name):
    port, started = free_port(), time.monotonic()
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1] == 0:
            child(name, rank, port)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(name, *codes, round(time.monotonic() - started), flush=True)


for number in range(3):  # they mostly wait, so three at a time
    if os.fork() == 0:
        for name in list(SCENES)[number::3]:
            play(name)
        os._exit(0)
for _ in range(3):
    os.wait()
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Folder with what the processes wrote; of each scene both exit codes and the seconds it took."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "script.py").write_text(SCRIPT)
    process = forked.start(["script.py", str(folder)], folder, os.environ | {"CUDA_VISIBLE_DEVICES": ""}, error="err")
    process.join(250)
    assert process.exitcode == 0, (folder / "err").read_text()
    lines = (folder / "out").read_text().splitlines()
    return folder, {(words := line.split())[0]: [int(word) for word in words[1:]] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "codes", "told"),
    [
        ("other_fails", [1, 1], ["error: process 1: the river is dry", "error: the river is dry"]),
        ("main_fails", [1, 1], ["error: the river is dry", "[process 1] error: process 0: the river is dry"]),
        ("other_breaks", [1, 1], ["process 1: KeyError: 'no such stone'", ""]),
        ("other_dies", [1, -9], ["process 1 ended without a word", ""]),
        ("main_dies", [-9, 1], ["", "process 0 ended without a word"]),
        ("dies_in_exchange", [1, -9], ["process 1 ended without a word", ""]),
        ("interrupted", [130, 130], ["", "[process 1] interrupted"]),
        ("agree", [0, 0], ["", ""]),
        ("differ", [1, 1], ["the data to be the same in all processes", "the data to be the same in all processes"]),
        ("main_breaks", [1, 1], ["'stone'", "KeyError: 'stone'"]),
        ("other_never_comes", [1, -9], ["error: process 1 of 2 did not start within 6 seconds", ""]),
        ("main_never_comes", [-9, 1], ["", "error: process 1 of 2 cannot reach process 0"]),
        ("other_dies_at_start", [1, -9], ["process 1 ended without a word", ""]),
        ("main_dies_at_start", [-9, 1], ["", "process 0 ended without a word"]),
        ("other_fails_at_start", [1, 1], ["process 1: the river is dry", "the river is dry"]),
        ("named_by_accelerate", [1, -9], ["process 1 ended without a word", ""]),
    ],
)  # fmt: skip
def test_one_ends_all(ended: tuple[Path, dict[str, list[int]]], scene: str, codes: list[int], told: list[str]) -> None:
    folder, scenes = ended
    outputs = [(folder / f"{scene}-{rank}").read_text() for rank in range(2)]
    assert scenes[scene][:2] == codes, outputs
    assert scenes[scene][2] < 40  # seconds
    for output, words in zip(outputs, told, strict=True):
        assert words in output
