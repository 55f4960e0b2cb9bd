"""The typer application: subcommands, those of other distributions included, and what is wrong with a command line."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdevkit.cli import COMMANDS
from mdevkit.cli.output import complain
from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Complaints(logging.Handler):
    """Tells what core and plugins log on stderr, with everything a terminal could act on escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(self.format(record))


def is_usage(error: Exception) -> bool:
    """Tell whether typer refused the command line; its base class is not public under one name in every version."""
    return isinstance(error, typer.BadParameter.__mro__[2])


def usage(error: Any) -> int:
    """Tell what is wrong with the command line and return the exit code."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "mdevkit"
    complain(f"{error.format_message()} (see {command} --help)")
    return int(error.exit_code)


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """Return the application with the subcommand that is asked for, or with all of them for help and for mistakes."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_Complaints()])
    app = typer.Typer(
        name="mdevkit",
        help="Mediated devices: list what there is, create devices, give them to hypervisors.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    if wanted in COMMANDS:
        _add(app, wanted, import_module(COMMANDS[wanted]).command)
        return app
    for name, module in COMMANDS.items():
        _add(app, name, import_module(module).command)
    _add_plugins(app, wanted)
    return app


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


def _add_plugins(app: typer.Typer, wanted: str | None) -> None:
    """Add the subcommands other distributions bring: the one asked for, or all."""
    from mdevkit.plugins import CLI, Catalog, installed

    catalog = Catalog(installed())
    for plugin in catalog.find(CLI, wanted) or catalog.find(CLI):
        try:
            _add(app, plugin.name, catalog.load(plugin))
        except MdevError as error:
            complain(f"{error} [{error.name}]")


def _version(wanted: bool) -> None:
    if wanted:
        from mdevkit.version import VERSION

        typer.echo(f"mdevkit {VERSION}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Mediated devices: list what there is, create devices, give them to hypervisors."""
