"""`lolcats generate`: continue a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lolcats.cli.load import load_model
from lolcats.cli.options import Device, Dtype, Model, NewTokens, Seed, Temperature, TopP, sampling
from lolcats.errors import LolcatsError
from lolcats.printable import show_bytes, without_controls


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads standard input.")],
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a text; speed and size of the state go to stderr."""
    text = read_prompt() if prompt == "-" else prompt
    if not text.strip():
        raise LolcatsError("the prompt is empty; give a text to continue")

    from transformers import DynamicCache, set_seed

    from lolcats.cli.streaming import CountingStreamer
    from lolcats.models.generation import sample

    network, tokenizer = load_model(model, device, dtype)
    set_seed(seed)
    streamer = CountingStreamer(tokenizer, silent=not stream)
    cache = DynamicCache(config=network.config)
    options = sampling(temperature, top_p)
    written = sample(network, tokenizer, text, max_new_tokens, streamer=streamer, past_key_values=cache, **options)
    if not stream:
        typer.echo(without_controls(written))
    memory = show_bytes(cache_bytes(cache))
    typer.echo(f"{streamer.tokens} tokens, {streamer.tokens_per_second:,.1f} tokens/s, {memory} of state", err=True)


def read_prompt() -> str:
    """Standard input as text.

    Raises:
        LolcatsError: it is not UTF-8.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise LolcatsError(
            f"standard input is not {error.encoding} (byte {error.start}); convert it first, for instance with "
            f"iconv -t UTF-8"
        ) from error


def cache_bytes(cache: object) -> int:
    """Bytes that a cache of transformers holds: states of linearized layers, keys and values of the others."""
    total = 0
    for layer in getattr(cache, "layers", []):
        held = getattr(layer, "nbytes", None)
        if held is None:
            tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
            held = sum(t.numel() * t.element_size() for t in tensors)
        total += held
    return total
