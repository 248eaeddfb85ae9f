"""The command line. It parses and prints; heavy imports wait inside the commands until they are needed."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, TextIO

import typer
from rich.console import Console

from fedveil import __version__, attack, audit, catalog, data, keys, ledger, machines, training
from fedveil.core.errors import FedveilError, SettingsError
from fedveil.core.foreign import legible
from fedveil.core.settings.legacy import OldKey

# commands that work with keys and answer other machines: they import what is installed and nothing of the working folder
SAFE = {"client", "keys", "server"}

app = typer.Typer(
    help="Federated learning that a person can run, deploy and attack.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("run")(training.run)
app.command("resume")(training.resume)
app.command("app")(training.flower_app)
app.command("list")(catalog.list_parts)
app.command("show")(catalog.show)
app.command("schema")(catalog.schema)
app.add_typer(data.app, name="data")
app.command("attack")(attack.attack)
app.command("audit")(audit.audit)
app.add_typer(keys.app, name="keys")
for command in (machines.server, machines.client, machines.submit, machines.status, machines.logs, machines.stop):
    app.command()(command)
app.command("ledger")(ledger.ledger)
app.command("version")(catalog.version)


@app.command(hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> None:
    """Point to the benchmarks, which 0.1.0 ran by this command and which now lie beside the package."""
    words = " ".join(["python -m benchmarks", *context.args])
    raise SettingsError(f"bench: is no command any more; in a checkout of FedVeil, run: {words}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedveil {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Federated learning that a person can run, deploy and attack."""


def main() -> None:
    """Run the command line; a mistake ends in one message and its exit code, never in a traceback."""
    if not SAFE.intersection(sys.argv[1:2]) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that a user's package.module:object is found, and hides nothing installed
    warnings.showwarning = _show_warning
    warnings.simplefilter("once", OldKey)
    try:
        app()
    except FedveilError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # such as a full disk or a removed folder
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning about an old key plainly on standard error, and others as Python does."""
    if issubclass(category, OldKey):
        print(f"warning {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _fail(message: str, code: int) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("stopped" if code == 130 else "error", style="bold red", end=" ")
    console.print(legible(message), markup=False)  # a message may hold [brackets], and quote another party
    sys.exit(code)
