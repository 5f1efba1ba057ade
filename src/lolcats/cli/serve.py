"""`lolcats serve`: a model behind OpenAI's protocol, by vLLM."""

from __future__ import annotations

import typer

from lolcats.cli.load import find_model
from lolcats.cli.options import Model


def serve(ctx: typer.Context, model: Model) -> None:
    """Serve a model by vLLM. What follows MODEL are options of vLLM's server, such as --port or --max-num-seqs."""
    from lolcats.models.folder import check_place
    from lolcats.serving.server import check_engine, run_server

    check_engine()
    folder = find_model(model)
    check_place(folder)
    run_server(folder, ctx.args)
