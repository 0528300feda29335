"""The root of the command line: its verbs, the root options, and errors turned into exit statuses.

Nothing here or at the top of a verb's module may import PyTorch, so that --help answers at once.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kangaroo import __version__
from kangaroo.cli.bench import bench_app
from kangaroo.cli.check import check_app
from kangaroo.cli.datastore import datastore_app
from kangaroo.cli.demo import demo_app
from kangaroo.cli.env import env_app
from kangaroo.cli.generate import generate_app
from kangaroo.cli.search import search_app
from kangaroo.cli.train import train_app
from kangaroo.cli.tune import tune_app
from kangaroo.errors import KangarooError


class Verbs(TyperGroup):
    """A group of verbs, each of which takes the root's --debug too."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb of this name, or None."""
        command = super().get_command(ctx, cmd_name)
        debug = next(param for param in ctx.find_root().command.params if param.name == "debug")
        if command is not None and debug not in command.params:
            command.params.append(debug)
        return command


app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False)
for verb in (demo_app, generate_app, check_app, tune_app, env_app):
    app.add_typer(verb)
app.add_typer(train_app, name="train", cls=Verbs)
app.add_typer(datastore_app, name="datastore", cls=Verbs)
app.add_typer(search_app, name="search", cls=Verbs)
app.add_typer(bench_app, name="bench", cls=Verbs)


def _remember_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.find_root().ensure_object(dict)["debug"] = True


def _print_version(value: bool) -> None:
    if value:
        print(f"kangaroo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug, expose_value=False),
    ] = False,
) -> None:
    """Lossless self-speculative decoding: the text is the model's own, only sooner.

    Exit status: 0 on success, 1 for an error, 2 for a command line that makes no sense.
    """


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every error ends here, as one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character shows "?" instead of ending the run.
        sys.stdout.reconfigure(errors="replace")
    options: dict[str, bool] = {}
    try:
        status = typer.main.get_command(app)(args=argv, prog_name="kangaroo", standalone_mode=False, obj=options)
    except typer.TyperException as error:
        return _report_usage(error)
    except KangarooError as error:
        return _report(f"error: {error}", debug="debug" in options)
    except Exception as error:
        # The last resort, so broad on purpose: whatever is left is a bug of ours, and the user sees one line.
        message = f"unexpected error: {type(error).__name__}: {error}; run again with --debug and report it"
        return _report(message, debug="debug" in options)
    return status if isinstance(status, int) else 0


def _report(message: str, *, debug: bool) -> int:
    """Print the message, after the traceback of the current error if wanted; returns the exit status."""
    if debug:
        traceback.print_exc()
    print(" ".join(message.split()), file=sys.stderr)
    return 1


def _report_usage(error: typer.TyperException) -> int:
    """Print what is wrong with the command line, or the help where nothing was asked; returns the exit status."""
    ctx = getattr(error, "ctx", None)
    if message := " ".join(error.format_message().split()):
        where = f"; see {ctx.command_path} --help" if ctx else ""
        print(f"error: {message.removesuffix('.')}{where}", file=sys.stderr)
    return error.exit_code
