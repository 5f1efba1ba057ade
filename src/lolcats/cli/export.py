"""`lolcats export`: write a linearized model so that others can load it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lolcats.cli.options import expand_path
from lolcats.errors import LolcatsError
from lolcats.printable import show_bytes

Source = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="The folder of a finished run or of its model.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", callback=expand_path, help="The folder to write.")]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="merged (the whole model), adapter (LoRA and feature maps only) or remote-code (the whole model, "
        "loadable without lolcats).",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the base model is called elsewhere. Default: the recipe's model."),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="float32, bfloat16 or float16: write the weights so. Default: as they are."),
]
ShardSize = Annotated[
    float | None,
    typer.Option(min=1e-6, metavar="GB", help="Most gigabytes (10^9) of a file. Default: the model's files."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")]
Push = Annotated[str | None, typer.Option(metavar="USER/NAME", help="Also upload it to the Hugging Face hub.")]
Private = Annotated[bool, typer.Option("--private", help="Make the hub's repository private if it is new.")]


def export(
    model: Source,
    out: Out,
    format_name: FormatName = "merged",
    base: Base = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    push_to_hub: Push = None,
    private: Private = False,
) -> None:
    """Write a model with its card: whole, as an adapter, or with the code that runs it."""
    if private and push_to_hub is None:
        raise LolcatsError("--private is about the hub; give --push-to-hub USER/NAME too")

    from lolcats.export import export_model
    from lolcats.export.api import check_shareable
    from lolcats.export.hub import check_login, push_folder

    if push_to_hub is not None:  # before anything is written
        check_login(push_to_hub)
        check_shareable(model, base)
    done = export_model(
        model, out, format_name, base=base, overwrite=overwrite, name=push_to_hub, hide_paths=push_to_hub is not None,
        dtype=dtype, shard_bytes=None if shard_size is None else round(shard_size * 10**9),
    )  # fmt: skip
    share = f", {done.size / done.model_size:.1%} of the model's {show_bytes(done.model_size)}"
    typer.echo(f"{format_name}: {done.folder}, {show_bytes(done.size)}{share if format_name == 'adapter' else ''}")
    if not done.report and (Path(model) / "config.yaml").is_file():
        typer.echo(f"no report beside it: lolcats report {model} makes one to export")
    if done.left_out:
        typer.echo(f"left out, no part of a model: {', '.join(map(repr, done.left_out))}")
    if push_to_hub is not None:
        typer.echo(f"uploaded: {push_folder(done.folder, push_to_hub, private=private)}")
