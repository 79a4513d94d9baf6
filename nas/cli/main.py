"""The entry point: sub-commands are found by walking this package; errors become one line and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from importlib.metadata import version

import typer
from rich.console import Console

import nas.cli
from nas.errors import RunStopped, UserMistake

__all__ = ["app", "error_console", "main"]

app = typer.Typer(
    name="nas",
    help="Find the best models by quality and by latency measured on the device that will run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nas-toolkit {version('nas-toolkit')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and the warnings of libraries."),
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print it."
    ),
) -> None:
    if debug:
        os.environ["NAS_DEBUG"] = "1"
        logging.basicConfig(level=logging.DEBUG)
    else:
        warnings.filterwarnings("ignore")


def _load_commands() -> None:
    for module in pkgutil.iter_modules(nas.cli.__path__):
        if module.name != "main" and not module.name.startswith("_"):
            importlib.import_module(f"nas.cli.{module.name}").register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0 success, 1 failure, 2 a mistake of the user, 128 + N stopped by signal N."""
    _load_commands()
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="nas", standalone_mode=False)
    except UserMistake as mistake:
        _fail(str(mistake), 2)
    except RunStopped as stopped:
        _fail(str(stopped), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        _handle_usage(error)
        if os.environ.get("NAS_DEBUG"):
            raise
        text = str(error).strip().splitlines()
        name = type(error).__name__
        _fail(
            f"{name}: {text[0] if text else 'no message'} (run with 'nas --debug ...' for the traceback)", 1
        )
    raise SystemExit(code if isinstance(code, int) else 0)


def _handle_usage(error: Exception) -> None:
    """Exit if ``error`` comes from parsing the command line.

    Recognised by its methods, because typer brings its own copy of click in some versions and imports it in others.
    """
    kind = type(error).__name__
    if kind == "Abort":
        raise SystemExit(130) from None
    if kind == "NoArgsIsHelpError":  # giving nothing prints the help
        raise SystemExit(2) from None
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "nas"
        _fail(f"{' '.join(error.format_message().split())} (see '{command} --help')", 2)


def _fail(text: str, code: int) -> None:
    if os.environ.get("NAS_DEBUG"):
        logging.getLogger(__name__).debug("stopped here", exc_info=True)
    error_console.print(f"error: {text}", style="red", markup=False)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
