"""Kill lolcats at random moments, run the same command again, and compare with a run that nobody disturbed.

    python tests/faults/kills.py --kills 300 --seed 0

Each trial is a command, or several that come one after the other, in a folder of its own. One of them is killed
(SIGKILL) once or twice, at a random time or at a random change to a file (one opened for writing, a rename, a deletion,
a new folder), or is disturbed otherwise (`faults.trials`), and then run to its end. At the end weights, checkpoints,
settings and results must be those of the undisturbed run to the last bit, but for clocks, and no file may be there that
it does not have.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the shared parts of the tests
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ["LOLCATS_MEETING_SECONDS"] = "10"  # how long processes wait for one that was killed before they met

import torch
from transformers.utils import logging

import lolcats.evaluation.recall
import lolcats.export
import lolcats.runs.blocks
import lolcats.runs.recipe
import lolcats.sweep  # noqa: F401  # what the verbs import when they run, imported once
from faults.cases import BLOCKS, make_cases
from faults.processes import Command, run
from faults.trials import Trial, measure
from tiny import SENTENCE, chat_tokenizer, save_teacher

torch.set_num_threads(1)
logging.disable_progress_bar()


def disturb_all(kills: int, seed: int, only: list[str], each: list[int], place: Path) -> int:
    """The trials, a line each; the number of those that failed.

    Args:
        kills: how many there are at least.
        seed: of all that is random.
        only: beginnings of the names of the cases; empty for all.
        each: how often a command may be killed in a trial.
        place: a folder.
    """
    save_teacher(place / "teacher", chat_tokenizer())
    save_teacher(place / "deeper", chat_tokenizer(), layers=BLOCKS)
    (place / "text.txt").write_text(SENTENCE * 40)
    cases = make_cases(place)
    linearize = cases[0].commands[0].words[0]
    cases = [case for case in cases if not only or case.name.startswith(tuple(only))]
    if any(str(place / "runs") in " ".join(case.commands[0].words[0]) for case in cases):  # they read a finished run
        outcome = run(place, Command([[*linearize, "name=run"]]))
        assert not any(outcome.codes), outcome.said
    for number, case in enumerate(cases):
        measure(case, place / f"undisturbed-{number}")
        events = sum(sum(command.events) for command in case.commands)
        print(f"{case.name}: {sum(c.seconds for c in case.commands):.1f} s, {events} file events", flush=True)
    chance, done, failed, number, others = random.Random(seed), 0, 0, 0, Counter[str]()
    while done < kills:
        trial = Trial(cases[number % len(cases)], place / f"trial-{number}", chance, each)
        trial.go()
        done, failed, number = done + trial.kills, failed + bool(trial.wrong), number + 1
        others.update(trial.other)
        for line in trial.wrong:
            print(f"trial {number}, {trial.case.name}, {', '.join(trial.other) or 'kill'}: {line}", flush=True)
        shutil.rmtree(trial.folder)
    beside = "".join(f", {count} x {name}" for name, count in sorted(others.items()))
    print(f"{done} kills{beside} in {number} trials (seed {seed}): {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="beginnings of the names of cases")
    parser.add_argument("--each", nargs="*", type=int, default=[1, 1, 2], help="kills of a trial; one is drawn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        failed = disturb_all(options.kills, options.seed, options.only, options.each, Path(temporary))
    sys.exit(1 if failed else 0)
