"""The application: its verbs, its global options, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from lolcats.cli.bench import bench
from lolcats.cli.benchmark import benchmark
from lolcats.cli.block import block
from lolcats.cli.check import check
from lolcats.cli.evaluate import evaluate
from lolcats.cli.export import export
from lolcats.cli.failures import INTERRUPTED, Interrupted, close_stdout, describe, is_usage_error, process_prefix
from lolcats.cli.generate import chat, generate
from lolcats.cli.inspect import inspect
from lolcats.cli.linearize import linearize
from lolcats.cli.plan import plan
from lolcats.cli.plan_memory import plan_memory
from lolcats.cli.plot import plot
from lolcats.cli.recall import recall
from lolcats.cli.report import report
from lolcats.cli.select_layers import select_layers
from lolcats.cli.serve import serve
from lolcats.cli.sweep import sweep, sweep_job
from lolcats.cli.terminal import write_anything
from lolcats.printable import printable
from lolcats.silence import no_bars


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an interruption leaves here as an ordinary exception, before typer prints a blank line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(ctx.invoked_subcommand)) from error


class _Verb(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        """Run a verb; every one of them may meet a linearized model, which transformers must be able to load."""
        import lolcats.modeling  # noqa: F401
        from lolcats.cli.load import silence

        silence()
        return super().invoke(ctx)


app = typer.Typer(cls=_Group, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for verb in (
    linearize, block, plan, plan_memory, select_layers, sweep, evaluate, benchmark, recall, bench, plot, report,
    generate, chat, inspect, check, export,
):  # fmt: skip
    app.command(cls=_Verb)(verb)
app.command("sweep-job", cls=_Verb, hidden=True)(sweep_job)
foreign = {"allow_extra_args": True, "ignore_unknown_options": True}  # options of vLLM
app.command(cls=_Verb, context_settings=foreign)(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lolcats.version import __version__

        typer.echo(f"lolcats {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def lolcats(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show warnings, and the traceback of an error.")] = False,
) -> None:
    """Turn a softmax-attention language model into one with linear cost in length, and measure what was kept."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes it from the process.

    Returns:
        The exit code: 0, 1 for an error, 2 for a command that cannot be understood, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    words = [word for word in options if word != "--debug"] + words[len(options) :]
    write_anything()
    os.environ.setdefault("TQDM_DISABLE", "1")  # for the processes that are started from here
    try:
        with warnings.catch_warnings(), no_bars():
            if not debug and not sys.warnoptions:
                warnings.simplefilter("ignore")
            code = get_command(app).main(args=words, prog_name="lolcats", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return close_stdout()
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        verb = error.verb if isinstance(error, Interrupted) else ""
        print(process_prefix() + INTERRUPTED.get(verb, "interrupted"), file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            print(printable(traceback.format_exc()), file=sys.stderr)
        print(f"{process_prefix()}error: {describe(error)}", file=sys.stderr)
        return 2 if is_usage_error(error) else 1
