"""`lolcats generate` and `lolcats chat`: what a model writes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lolcats.cli.generate_file import BATCH_SIZE, CHUNK, FileJob, generate_file
from lolcats.cli.load import length_note, load_model
from lolcats.cli.options import (
    Device,
    DeviceMapName,
    Dtype,
    Graphs,
    Model,
    NewTokens,
    Seed,
    Temperature,
    TopP,
    check_target,
    expand_path,
    sampling,
)
from lolcats.errors import LolcatsError
from lolcats.models.conversation import Conversation
from lolcats.printable import one_line, show_bytes, without_controls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue; - reads standard input.")
    ] = None,
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    graphs: Graphs = True,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", callback=expand_path, help="Prompts or messages, a JSON object a line."
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", callback=check_target, help="Answers to --input, a JSON object a line."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"Rows of --input that are written at once; default {BATCH_SIZE}.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens of a long row that are read at once; default {CHUNK}.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output where it is there.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMapName = None,
) -> None:
    """Continue a text, or all texts of a file; goes on with a file where it was interrupted."""
    if source is None:
        if target is not None or batch_size is not None or chunk is not None or overwrite:
            raise typer.BadParameter("--output, --batch-size, --chunk and --overwrite belong to --input FILE; give it")
        _generate_one(model, prompt, max_new_tokens, sampling(temperature, top_p), seed, stream, graphs, device, dtype,
                      device_map)  # fmt: skip
        return
    if prompt is not None or not stream:
        raise typer.BadParameter("PROMPT and --no-stream are of one text, and --input is a file of them; give one")
    if target is None:
        raise typer.BadParameter("--input needs --output FILE, where the answers are written")
    from lolcats.serving.requests import Defaults

    job = FileJob(source, target, batch_size or BATCH_SIZE, chunk or CHUNK, overwrite)
    generate_file(model, job, Defaults(max_new_tokens, temperature, top_p, seed), device, dtype, graphs, device_map)


def _generate_one(
    model: str,
    prompt: str | None,
    max_new_tokens: int,
    options: dict[str, object],
    seed: int,
    stream: bool,
    graphs: bool,
    device: str,
    dtype: str,
    device_map: str | None,
) -> None:
    """One text, printed as it comes; speed and size of the state go to stderr."""
    if prompt is None:
        raise typer.BadParameter("give a PROMPT, or --input FILE with --output FILE")
    text = _read_prompt() if prompt == "-" else prompt
    if not text.strip():
        raise LolcatsError("the prompt is empty; give a text to continue")

    from transformers import DynamicCache, set_seed

    from lolcats.modeling.cache_contents import cache_bytes
    from lolcats.models.generation import encode, sample

    network, tokenizer = load_model(model, device, dtype, graphs, device_map)
    if (note := length_note(model, encode(tokenizer, text).shape[1] + max_new_tokens)) is not None:
        typer.echo(one_line(note), err=True)
    set_seed(seed)
    streamer = CountingStreamer(tokenizer, silent=not stream)
    cache = DynamicCache(config=network.config)
    written = sample(network, tokenizer, text, max_new_tokens, streamer=streamer, past_key_values=cache, **options)
    if not stream:
        typer.echo(without_controls(written))
    memory = show_bytes(cache_bytes(cache))
    typer.echo(f"{streamer.tokens} tokens, {streamer.tokens_per_second:,.1f} tokens/s, {memory} of state", err=True)


def chat(
    model: Model,
    max_new_tokens: NewTokens = 400,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    graphs: Graphs = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMapName = None,
) -> None:
    """Talk with a model. /reset begins again; /exit, Ctrl-D or Ctrl-C leaves."""
    from transformers import set_seed

    network, tokenizer = load_model(model, device, dtype, graphs, device_map)
    talk = Conversation(network, tokenizer, max_new_tokens=max_new_tokens, **sampling(temperature, top_p))
    set_seed(seed)
    prompt = "you> " if sys.stdin.isatty() else ""
    try:
        while (line := input(prompt).strip()) != "/exit":
            if line == "/reset":
                talk.reset()
            elif line:
                talk.reply(line, CountingStreamer(tokenizer))
    except (EOFError, KeyboardInterrupt):
        typer.echo()
    except UnicodeDecodeError as error:
        raise LolcatsError(f"standard input is not {error.encoding} (byte {error.start}); convert it first") from error


class CountingStreamer:
    """Prints tokens as they come (unless `silent`), without what a terminal would obey, and counts them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, silent: bool = False) -> None:
        from transformers import TextStreamer

        def show(text: str, stream_end: bool = False) -> None:
            if not silent:
                print(without_controls(text), flush=True, end="\n" if stream_end else "")

        self._printer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self._printer.on_finalized_text = show
        self.tokens = -1  # the prompt comes first
        self.start = self.first = self.latest = time.perf_counter()

    def put(self, value: Any) -> None:
        """Take the prompt at the first call, then a token a call."""
        self.tokens += 1
        if self.tokens > 0:
            self.latest = time.perf_counter()
            self.first = self.latest if self.tokens == 1 else self.first
        self._printer.put(value)

    def end(self) -> None:
        """Print what is left."""
        self._printer.end()

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, whose time is the prompt's."""
        seconds = self.latest - self.first if self.tokens > 1 else self.latest - self.start
        return max(self.tokens - 1, 1) / seconds if seconds else 0.0


def _read_prompt() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise LolcatsError(
            f"standard input is not {error.encoding} (byte {error.start}); convert it first, for instance with "
            f"iconv -t UTF-8"
        ) from error
