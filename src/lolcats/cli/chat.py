"""`lolcats chat`: a conversation in the terminal."""

from __future__ import annotations

import sys

import typer

from lolcats.cli.load import load_model
from lolcats.cli.options import Device, Dtype, Model, NewTokens, Seed, Temperature, TopP, sampling
from lolcats.errors import LolcatsError
from lolcats.models.conversation import Conversation


def chat(
    model: Model,
    max_new_tokens: NewTokens = 400,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model. /reset begins again; /exit, Ctrl-D or Ctrl-C leaves."""
    from transformers import set_seed

    from lolcats.cli.streaming import CountingStreamer

    network, tokenizer = load_model(model, device, dtype)
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
