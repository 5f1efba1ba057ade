"""The command line and scripts in processes of their own, forked from one that has imported what they use.

A start of Python that imports transformers and peft costs ten seconds of CPU time, a fork nothing. What is said while
modules are imported, and what happens when the interpreter ends, needs a start: `subprocess`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lolcats.cli", "lolcats.runs.recipe", "lolcats.sweep"])


def start(words: Sequence[str], folder: Path, environment: dict[str, str], error: str = "out") -> ForkServerProcess:
    """Start `python WORDS ... >out 2>ERROR`.

    Args:
        words: `["-m", module, ...]` or `[script, ...]`.
        folder: working folder, in which it writes.
        environment: all variables.
        error: name of the file for stderr.

    Returns:
        The process, with `pid`, `join`, `exitcode`, `kill`. It ends with this one at the latest.
    """
    process = CONTEXT.Process(target=run, args=(list(words), folder, environment, error), daemon=True)
    process.start()
    return process


def run(words: list[str], folder: Path, environment: dict[str, str], error: str) -> None:
    """What the forked process does."""
    import torch

    gc.freeze()  # a collection of garbage would look through all that is imported, and copy its pages
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with SIGINT ignored
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name, descriptor in (("out", 1), (error, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run_together(words: list[str], processes: int, folder: Path) -> list[tuple[int | None, str]]:
    """Exit code and output of each of the processes, which find each other as `torchrun` would have them."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"MASTER_PORT": str(free.getsockname()[1])}
    running, folders = [], [Path(tempfile.mkdtemp(dir=folder)) for _ in range(processes)]
    for rank, own_folder in enumerate(folders):
        own = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}",
               "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "ACCELERATE_USE_CPU": "1"}  # fmt: skip
        running.append(start(words, own_folder, env | own if processes > 1 else env, error="out"))
    try:
        for process in running:
            process.join(250)
        outputs = [(own_folder / "out").read_text() for own_folder in folders]
        return [(process.exitcode, output) for process, output in zip(running, outputs, strict=True)]
    finally:
        for process in running:
            process.kill()
