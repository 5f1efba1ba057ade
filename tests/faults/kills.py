"""Kill lolcats at random moments, run the same command again, and compare with a run that nobody disturbed.

    python tests/faults/kills.py --kills 300 --seed 0

Each trial is a verb in a folder of its own. It is killed (SIGKILL) once or twice, at a random time or at a random file
event (a file opened for writing, a rename, a deletion, a new folder), and then run to its end. At the end weights,
checkpoints, settings and results must be those of the undisturbed run to the last bit, but for clocks, and no file may
be there that it does not have.

The commands run in forked children of this process, which has imported everything: a start then takes no time, so the
kills fall into the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the shared parts of the tests
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ["LOLCATS_MEETING_SECONDS"] = "10"  # how long processes wait for one that was killed before they met

import torch
from transformers.utils import logging

import lolcats.evaluation.recall
import lolcats.export
import lolcats.runs.recipe
import lolcats.sweep  # noqa: F401  # what the verbs import when they run, imported once
from lolcats.cli import main
from tiny import SENTENCE, chat_tokenizer, save_teacher

torch.set_num_threads(1)
logging.disable_progress_bar()
CLOCKS = ("seconds", "per_second", "date", "time", "mtime")
"""Parts of the names of values that differ from run to run."""
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
LIMIT = 60.0
"""Seconds within which all processes of a run end after one of them was killed."""


@dataclass
class Case:
    """A command that can be killed.

    `again` goes on after a kill. With `ranks` above 1 so many processes run it together.
    """

    name: str
    words: list[str]
    again: list[str]
    ranks: int = 1
    files: dict[str, str] = field(default_factory=dict)
    """What lies in the folder before: name -> content."""
    seconds: float = 0.0
    events: int = 0
    wanted: dict[str, str] = field(default_factory=dict)
    """File -> digest after an undisturbed run."""


@dataclass
class Kill:
    """When to kill, and which of the processes."""

    rank: int
    seconds: float | None = None
    event: int | None = None


def run(case: Case, folder: Path, words: Sequence[str], kill: Kill | None = None) -> tuple[list[int], float]:
    """Run a command in `folder`; exit codes of its processes (negative: the signal) and the time it took."""
    begun = time.monotonic()
    port = free_port()
    children = [
        start(folder, words, rank, case.ranks, port, kill if kill and kill.rank == rank else None)
        for rank in range(case.ranks)
    ]
    if kill is not None and kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(children[kill.rank], signal.SIGKILL)
    return [wait(child, kill is not None) for child in children], time.monotonic() - begun


def wait(child: int, limited: bool) -> int:
    """The exit code of a child; where another was killed it has `LIMIT` seconds, and is then killed too."""
    deadline = time.monotonic() + 2 * LIMIT
    while limited and time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    if limited:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(folder: Path, words: Sequence[str], rank: int, ranks: int, port: int, kill: Kill | None) -> int:
    """A child that runs the command line; its process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 70
    try:
        os.chdir(folder)
        with Path("output").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ["LOLCATS_CACHE"] = str(folder / "cache")
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        count = watch_events(None if kill is None else kill.event)
        code = main(list(words))
        Path(f"events.{rank}").write_text(str(count()))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def watch_events(last: int | None) -> Callable[[], int]:
    """Count this process's changes to files, and kill it at number `last`."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing or event in WRITES:
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: seen


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def digests(folder: Path) -> dict[str, str]:
    """What is in a folder: relative name -> digest of the content, clocks left out; lock files are no content."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name.endswith(".lock") or name.startswith(("output", "events.")):
            continue
        content = file.read_bytes()
        if name.startswith("cache"):  # its index has times of files in it
            content = b"" if file.suffix == ".json" else content
        elif file.suffix in (".json", ".jsonl", ".csv", ".md"):
            content = without_clocks(content.decode())
        elif file.suffix == ".safetensors":
            content = tensors_without_clocks(content)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def without_clocks(text: str) -> bytes:
    """The JSON objects of a file without what a clock put into them."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if not any(word in k for word in CLOCKS)}
        return [strip(item) for item in value] if isinstance(value, list) else value

    try:
        return json.dumps(strip(json.loads(text))).encode()
    except ValueError:
        pass
    try:
        return "\n".join(json.dumps(strip(json.loads(line))) for line in text.splitlines()).encode()
    except ValueError:
        return b""  # tables for people: their numbers are those of the JSON file beside them


def tensors_without_clocks(content: bytes) -> bytes:
    """A safetensors file without the time that a checkpoint's metadata holds."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    if "content" in metadata:
        metadata["content"] = without_clocks(metadata["content"]).decode()
    return json.dumps(header, sort_keys=True).encode() + content[8 + size :]


def make_cases(place: Path) -> list[Case]:
    """The commands that are killed."""
    settings = {
        "device": "cpu", "dtype": "float32", "data.sequence_length": 32, "data.validation_sequences": 2,
        "data.sources": [str(place / "text.txt")], "linearization.mixer": "hybrid", "linearization.window": 8,
        "linearization.start": "matched", "linearization.sinks": 4, "finetune.rank": 2, "transfer.recall.share": 0,
        "finetune.recall.share": 0,
        "transfer.tokens": 384, "transfer.batch_size": 2, "transfer.checkpoint_every": 1, "transfer.validate_every": 2,
        "finetune.tokens": 384, "finetune.batch_size": 2, "finetune.checkpoint_every": 1, "finetune.validate_every": 2,
    }  # fmt: skip
    linearize = ["linearize", str(place / "teacher"), *(f"{key}={value}" for key, value in settings.items())]
    sweep = json.dumps({"model": str(place / "teacher"), **settings, "finetune.merge": False})
    study = f'{{"base": "hybrid", "settings": {sweep}, "grid": {{"finetune.lr": [0.001, 0.01]}}}}'
    run_folder = str(place / "runs" / "run")
    text = ["evaluate", run_folder, "--sources", str(place / "text.txt"), "--json", "scores.json"]
    recall = ["recall", run_folder, "passkey", "--lengths", "600", "--samples", "3", "--json", "r.json"]
    export = ["export", run_folder, "shared", "--format"]
    return [
        Case("linearize", linearize, [*linearize, "--resume"]),
        Case("linearize, two ranks", linearize, [*linearize, "--resume"], ranks=2),
        Case("evaluate", text, text),
        Case("recall", recall, recall),
        Case("sweep", ["sweep", "study.yaml"], ["sweep", "study.yaml"], files={"study.yaml": study}),
        Case("export", [*export, "merged"], [*export, "merged", "--overwrite"]),
        Case("export remote-code", [*export, "remote-code"], [*export, "remote-code", "--overwrite"]),
    ]


def open_folder(case: Case, folder: Path) -> None:
    folder.mkdir()
    for name, content in case.files.items():
        (folder / name).write_text(content)


def measure(case: Case, folder: Path) -> None:
    """An undisturbed run: how long it takes, what it changes, what it leaves."""
    open_folder(case, folder)
    codes, case.seconds = run(case, folder, case.words)
    assert not any(codes), (folder / "output").read_text()
    case.events = int((folder / "events.0").read_text())
    case.wanted = digests(folder)


def trial(case: Case, folder: Path, chance: random.Random) -> tuple[int, list[str]]:
    """Kill a command once or twice, run it to its end, and compare: the number of kills, and what is wrong."""
    open_folder(case, folder)
    words, kills = case.words, 0
    for _ in range(chance.choice([1, 1, 2])):
        kill = Kill(chance.randrange(case.ranks))
        if case.ranks == 1 and chance.random() < 0.6:
            kill.event = chance.randint(1, case.events)
        else:
            kill.seconds = chance.uniform(0, case.seconds)
        codes, seconds = run(case, folder, words, kill)
        words, kills = case.again, kills + 1
        if seconds > case.seconds + LIMIT:
            return kills, [f"all processes ended only {seconds:.0f} s after the start ({codes})"]
    codes, _ = run(case, folder, words)
    if any(codes):
        return kills, [f"the last run ended with {codes}", *(folder / "output").read_text().splitlines()[-3:]]
    found = digests(folder)
    return kills, [
        *(f"{name} is missing" for name in case.wanted.keys() - found.keys()),
        *(f"{name} should not be there" for name in found.keys() - case.wanted.keys()),
        *(f"{name} differs" for name in found.keys() & case.wanted.keys() if found[name] != case.wanted[name]),
    ]


def kill_all(kills: int, seed: int, only: str, place: Path) -> int:
    """The trials, a line each; the number of those that failed."""
    save_teacher(place / "teacher", chat_tokenizer())
    (place / "text.txt").write_text(SENTENCE * 40)
    cases = make_cases(place)
    codes, _ = run(cases[0], place, [*cases[0].words, "name=run"])
    assert not any(codes), (place / "output").read_text()
    cases = [case for case in cases if only in case.name]
    for number, case in enumerate(cases):
        measure(case, place / f"undisturbed-{number}")
        print(f"{case.name}: {case.seconds:.1f} s, {case.events} file events", flush=True)
    chance, done, failed, number = random.Random(seed), 0, 0, 0
    while done < kills:
        case = cases[number % len(cases)]
        folder = place / f"trial-{number}"
        count, wrong = trial(case, folder, chance)
        done, failed, number = done + count, failed + bool(wrong), number + 1
        for line in wrong:
            print(f"trial {number}, {case.name}: {line}", flush=True)
        shutil.rmtree(folder)
    print(f"{done} kills in {number} trials (seed {seed}): {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a case's name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(1 if kill_all(options.kills, options.seed, options.only, Path(temporary)) else 0)
