"""`lolcats generate MODEL --input FILE --output FILE`: the rows of a file, many at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lolcats.cli.failures import Interrupted
from lolcats.cli.load import length_note, load_model
from lolcats.cli.sweep_tables import show_time
from lolcats.cli.tables import say
from lolcats.cli.terminal import SafeConsole
from lolcats.errors import DataError, LolcatsError
from lolcats.files import read_json_lines, write_text
from lolcats.printable import one_line

if TYPE_CHECKING:
    from lolcats.serving.offline import Answer
    from lolcats.serving.requests import Defaults, Request

BATCH_SIZE, CHUNK = 16, 2048
SHOWN = 3
"""Rows that cannot be done of which is said why."""
EVERY = 60.0
"""Seconds between lines of progress."""


@dataclass(frozen=True)
class FileJob:
    """What is asked on the command line."""

    source: Path
    target: Path
    batch_size: int
    chunk: int
    overwrite: bool

    @property
    def progress(self) -> Path:
        """Where finished rows are kept until all are there."""
        return self.target.with_name(f"{self.target.name}.progress")


def generate_file(
    model: str,
    job: FileJob,
    defaults: Defaults,
    device: str,
    dtype: str,
    graphs: bool = True,
    device_map: str | None = None,
) -> None:
    """Answer the rows of a file; what is finished is kept when the command is interrupted.

    Raises:
        LolcatsError: the files, before the model is loaded; or what `generate_batch` raises.
    """
    rows = _read_rows(job)
    out = SafeConsole(stderr=True)

    from lolcats.evaluation.store import AnswerStore
    from lolcats.serving.offline import answer_all
    from lolcats.serving.requests import read_requests

    goes_on = job.progress.exists()
    try:
        with AnswerStore(job.progress) as store:
            if goes_on:
                say(out, f"going on with rows that were finished before ({job.progress})")
            with _bar(out) as counter:
                network, tokenizer = load_model(model, device, dtype, graphs, device_map)
                requests = read_requests(network, tokenizer, [row for row, _ in rows], defaults, job.batch_size)
                _say_refused(out, requests, [where for _, where in rows])
                longest = max(request.prompt_tokens + request.max_new_tokens for request in requests)
                if (note := length_note(model, longest)) is not None:
                    say(out, one_line(note))
                answers = answer_all(network, tokenizer, requests, job.batch_size, job.chunk, store, counter.show)
            write_text(job.target, "".join(_line(answer) for answer in answers))
    except KeyboardInterrupt as error:
        raise Interrupted("generate --input") from error
    failed = sum(answer.error is not None for answer in answers)
    errors = f", {failed:,} of them with an error" if failed else ""
    say(out, f"{len(answers):,} rows in {job.target}{errors}; {counter.line()}")


def _read_rows(job: FileJob) -> list[tuple[dict[str, Any], str]]:
    """The objects of the file, each with "file:line", once it is known that the answers can be written."""
    if job.target.exists():
        if job.source.exists() and job.target.samefile(job.source):
            raise LolcatsError(f"{job.target} is the input; name another file for the answers")
        if not job.overwrite:
            raise LolcatsError(f"{job.target} is there already; name another file, or replace it", hint="overwrite")
    try:
        with job.source.open("rb") as raw:
            rows = list(read_json_lines(str(job.source), raw))
    except OSError as error:
        raise LolcatsError(f"cannot read {job.source}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f'{job.source} has no rows; expected objects such as {{"prompt": "..."}}, one a line')
    return rows


def _say_refused(out: SafeConsole, requests: Sequence[Request], places: Sequence[str]) -> None:
    """Name the first rows that cannot be done: there is time to stop and to mend them."""
    refused = [(place, request.error) for place, request in zip(places, requests, strict=True) if request.error]
    for place, error in refused[:SHOWN]:
        say(out, one_line(f"{place}: {error}"))
    if len(refused) > SHOWN:
        say(out, f"and {len(refused) - SHOWN:,} more rows that cannot be done")


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


class _Counter:
    """Rows and tokens so far, shown as they come: in a bar, or where there is no terminal in a line now and then."""

    def __init__(self, out: SafeConsole, bars: Progress) -> None:
        self.out, self.bars, self.shown = out, bars, bars.add_task("loading the model", total=None)
        self.start = self.told = time.perf_counter()
        self.done = self.before = self.count = self.tokens = 0

    def show(self, done: int, count: int, tokens: int) -> None:
        """See `Report`."""
        now = time.perf_counter()
        if tokens == 0:  # what it took to find the rows that are there is no speed of the model
            self.start, self.before = now, done
        self.done, self.count, self.tokens, self.seconds = done, count, tokens, now - self.start
        self.bars.update(self.shown, completed=done, total=count, description=f"rows, {self.line()}")
        if not self.out.is_terminal and now - self.told > EVERY:
            self.told = now
            say(self.out, f"{done:,} of {count:,} rows, {self.line()}")

    def line(self) -> str:
        """Tokens, how fast they came, and how long the rest may take, if its rows are like those that are done."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        line = f"{self.tokens:,} new tokens, {speed:,.1f} tokens/s"
        if not self.before < self.done < self.count:
            return line
        left = self.seconds / (self.done - self.before) * (self.count - self.done)
        return f"{line}, {show_time(left)} left"


@contextmanager
def _bar(out: SafeConsole) -> Iterator[_Counter]:
    columns = (
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        yield _Counter(out, bars)
