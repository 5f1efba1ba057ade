"""A trial: commands that run in a folder of their own, one of which is disturbed, and what is left in the end.

| fault     | what happens                                                                                  |
|-----------|-----------------------------------------------------------------------------------------------|
| kill      | one process is killed, or all of a node; a job that was killed is started again by its queue  |
| full disk | from some change to a file on, a process can write no more                                    |
| damage    | a bit of a file of hidden states is flipped, or its end is lost, after a kill                 |
| twice     | a job is started again while it runs                                                          |
| missing   | what one block has left is gone before the last command                                       |

After a fault the commands are started again, in their order, as a person would. Where one of them refuses, it must say
in one line what to do, and that is done.
"""

from __future__ import annotations

import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from faults.cases import Case
from faults.digests import differences, digests
from faults.processes import LIMIT, Command, Fault, Outcome, run

ROUNDS = 4
"""How often the commands are started again after one fault, each time with what the last one said to do."""
DELETE = [
    re.compile(r"(\S+) is damaged: .*; delete it"),
    re.compile(r"delete (?:its folder )?(\S*/\S+?)[;,]? (?:and|to) "),
]
"""Where messages name what is to be deleted."""


@dataclass
class Trial:
    """One of them."""

    case: Case
    folder: Path
    chance: random.Random
    each: list[int]
    """How often one command is killed; one of these is drawn."""
    kills: int = 0
    other: list[str] = field(default_factory=list)
    """Faults that were no kills."""
    wrong: list[str] = field(default_factory=list)

    def go(self) -> None:
        """Disturb one command, run all to the end, and compare."""
        open_folder(self.case, self.folder)
        commands = self.case.commands
        kind = self.chance.choice(self.case.faults)
        target = len(commands) - 1 if kind == "missing" else self.chance.randrange(len(commands))
        for command in commands[:target]:
            self._expect_success(run(self.folder, command))
        if kind == "missing" and len(commands) > 1:
            self._lose_a_block()
        elif kind in ("full disk", "twice"):
            self._disturb(commands[target], kind)
        for _ in range(self.chance.choice(self.each)):
            self._disturb(commands[target], "kill")
            if kind == "damage":
                self._damage_a_file()
        self._recover(target)
        for command in commands[target + 1 :]:
            self._expect_success(run(self.folder, command))
        if not self.wrong:
            self.wrong += differences(digests(self.folder), self.case.wanted)

    def _disturb(self, command: Command, kind: str) -> None:
        fault = self._choose(command, kind)
        again = (self.folder / "output").exists()
        outcome = run(self.folder, command, again, fault)
        self.kills += outcome.killed
        if kind != "kill":
            self.other.append(kind)
        if outcome.seconds > command.seconds + LIMIT:
            self.wrong.append(f"all processes ended only {outcome.seconds:.0f} s after the start ({outcome.codes})")
        self._look_at(outcome, kind)

    def _choose(self, command: Command, kind: str) -> Fault:
        """When a fault comes, and to whom."""
        hit = self.chance.randrange(len(command.words))
        if kind == "twice" or command.together == "ranks" or (kind == "kill" and self.chance.random() < 0.4):
            node = [hit]
            if kind == "kill" and command.together == "torchrun" and self.chance.random() < 0.3:
                node = list(range(1, len(command.words)))  # all processes of a node
            return Fault(kind, node, seconds=self.chance.uniform(0, command.seconds))  # type: ignore[arg-type]
        return Fault(kind, [hit], event=self.chance.randint(1, max(1, command.events[hit])))  # type: ignore[arg-type]

    def _damage_a_file(self) -> None:
        """Flip a bit of a file of hidden states, or cut its end off."""
        files = sorted(self.folder.rglob("hidden/boundary-*/[a-z]*.safetensors"))
        if not files:
            return
        file = self.chance.choice(files)
        content = bytearray(file.read_bytes())
        if self.chance.random() < 0.5:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        else:
            del content[self.chance.randrange(len(content)) :]
        file.write_bytes(content)
        self.other.append("damage")

    def _lose_a_block(self) -> None:
        shutil.rmtree(self.chance.choice(sorted(self.folder.rglob("checkpoints/transfer/block-*"))))
        self.other.append("missing")

    def _recover(self, target: int) -> None:
        """Run the commands up to `target` again, and do what they say."""
        for left in reversed(range(ROUNDS)):
            outcomes = (run(self.folder, command, again=True) for command in self.case.commands[: target + 1])
            refused = next((outcome for outcome in outcomes if any(outcome.codes)), None)
            if refused is None:
                return
            self._look_at(refused, "fault")
            if not left:
                self.wrong += ["what the commands say does not help:", *refused.said.splitlines()[-3:]]
            self._delete_what_is_named(refused.said)

    def _delete_what_is_named(self, said: str) -> None:
        for pattern in DELETE:
            for found in pattern.findall(said):
                path = self.folder / found
                assert self.folder in path.resolve().parents, path
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _look_at(self, outcome: Outcome, what: str) -> None:
        """Whoever failed and was not killed must have said why, and not by a traceback."""
        failed = [code for code in outcome.codes if code > 0]
        if "Traceback" in outcome.said or (failed and "rror" not in outcome.said):
            self.wrong += [f"after {what} ({outcome.codes}) it says:", *outcome.said.splitlines()[-12:]]

    def _expect_success(self, outcome: Outcome) -> None:
        if any(outcome.codes):
            self.wrong += [f"a command ended with {outcome.codes}", *outcome.said.splitlines()[-3:]]


def open_folder(case: Case, folder: Path) -> None:
    folder.mkdir()
    for name, content in case.files.items():
        (folder / name).write_text(content)


def measure(case: Case, folder: Path) -> None:
    """An undisturbed run: how long each command takes, how often it changes files, and what all leave."""
    open_folder(case, folder)
    for command in case.commands:
        outcome = run(folder, command)
        assert not any(outcome.codes), outcome.said
        command.seconds = outcome.seconds
        command.events = [int((folder / f"events.{number}").read_text()) for number in range(len(command.words))]
    case.wanted = digests(folder)
