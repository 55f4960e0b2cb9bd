"""The typer application: subcommands, those of other distributions included, and what is wrong with a command line."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand
from typer.main import get_command

from mdevkit.cli import COMMANDS
from mdevkit.cli.output import as_bytes, complain, is_utf8
from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from collections.abc import Sequence


#: Set while a shell asks for completions, instead of arguments; the name is typer's.
_COMPLETE: Final = "_MDEVKIT_COMPLETE"
#: Where the line to complete is then, by shell.
_LINES: Final = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
#: Metavars of what names files of the user's, of whose names the kernel wants no encoding.
_FILES: Final = frozenset({"FILE", "DIR"})


class _Command(TyperCommand):
    """A subcommand that refuses text which is not UTF-8: no JSON could carry it to the service."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line; usage for an argument that is not UTF-8."""
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            given = ctx.params.get(parameter.name)
            for text in given if isinstance(given, list | tuple) else [given]:
                if isinstance(text, str) and not is_utf8(text) and parameter.metavar not in _FILES:
                    raise typer.BadParameter(f"'{as_bytes(text)}' is not UTF-8", ctx, parameter)
        return rest


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
    message = error.format_message()
    # Who gave no subcommand at all has got the help.
    complain(message if context and message == context.get_help() else f"{message} (see {command} --help)")
    return int(error.exit_code)


def carry_out(arguments: Sequence[str]) -> Any:
    """Carry out a command line and return what the subcommand returns, or the exit code it asks for."""
    app = make_app(arguments)
    if _COMPLETE in os.environ:
        return app([*arguments], prog_name="mdevkit", standalone_mode=False)
    command = get_command(app)
    try:
        # What calling it does beside would take a service that hangs up on us (EPIPE) for a pipe nobody reads.
        with command.make_context("mdevkit", [*arguments]) as context:
            return command.invoke(context)
    except typer.Exit as end:
        return end.exit_code


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """Return the application with the subcommand that is asked for, or with all of them for help and for mistakes."""
    completing = _COMPLETE in os.environ
    # Nobody wants complaints in the line being typed.
    handler = logging.NullHandler() if completing else _Complaints()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler])
    wanted = next((word for word in (_typed() if completing else arguments) if not word.startswith("-")), None)
    app = typer.Typer(
        name="mdevkit",
        help="Mediated devices: list what there is, create devices, give them to hypervisors.",
        no_args_is_help=True,
        add_completion=completing or wanted not in COMMANDS,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    if wanted in COMMANDS:
        _add(app, wanted, import_module(COMMANDS[wanted]).command)
    elif not (wanted and _add_plugins(app, wanted)):
        for name, module in COMMANDS.items():
            _add(app, name, import_module(module).command)
        _add_plugins(app)
    return app


def _typed() -> list[str]:
    """Return the whole words of the line a shell wants completed: the last may be the beginning of several subcommands."""
    line = next((os.environ[name] for name in _LINES if name in os.environ), "")
    words = line.split()[1:]
    return words if line[-1:].isspace() else words[:-1]


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        _refuse_bytes(command)
        app.add_typer(command, name=name)
    else:
        app.command(name, cls=_Command)(command)


def _refuse_bytes(app: typer.Typer) -> None:
    """Make the subcommands of a subcommand `_Command`s, unless they have a class of their own."""
    for info in app.registered_commands:
        info.cls = _Command if info.cls is TyperCommand else info.cls
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _refuse_bytes(group.typer_instance)


def _add_plugins(app: typer.Typer, wanted: str | None = None) -> int:
    """Add the subcommands other distributions bring, or only the one of that name; return how many there are."""
    from mdevkit.plugins import CLI, Catalog, installed

    catalog = Catalog(installed())
    found = catalog.find(CLI, wanted)
    for plugin in found:
        try:
            _add(app, plugin.name, catalog.load(plugin))
        except MdevError as error:
            logging.getLogger(__name__).warning("%s [%s]", error, error.name)
    return len(found)


def _version(wanted: bool) -> None:
    if wanted:
        from mdevkit.version import VERSION

        typer.echo(f"mdevkit {VERSION}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Mediated devices: list what there is, create devices, give them to hypervisors."""
