"""The command itself, under any name: mdevctl's commands, or as ``lsmdev`` its ``list`` alone."""

from __future__ import annotations

import os
import sys

from mdevkit.cli.output import complain, need_output, say, say_made, unless_broken_off
from mdevkit.client import Client
from mdevkit.errors import MdevError

from mdevkit_service.mdevctl.manager import Manager, reason
from mdevkit_service.mdevctl.options import COMMANDS, UsageError, help_of, overview, parse
from mdevkit_service.mdevctl.store import find_store

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final

#: The release whose commands, texts and files these are.
COMPATIBLE: Final = "1.4.0"


def main() -> int:
    """Run the command line and return the exit code: 0, 1 (the operation failed) or 2 (usage)."""
    return run(os.path.basename(sys.argv[0]), sys.argv[1:])  # noqa: PTH119


def run(program: str, arguments: Sequence[str]) -> int:
    """Run `arguments` of the command called `program`."""
    try:
        return unless_broken_off(lambda: _told(program, arguments))
    except MdevError as error:
        complain(f"Error: {_with_causes(error)}")
        return 1


def _told(program: str, arguments: Sequence[str]) -> int:
    """Run a command; what is wrong with the command line, and help, is told."""
    try:
        return _run(program, arguments)
    except UsageError as error:
        (complain if error.code else _print_lines)(error)
        return error.code


def _run(program: str, arguments: Sequence[str]) -> int:
    if program == "lsmdev":
        name, usage, rest = "list", program, arguments
    else:
        name, rest = _command(program, arguments)
        usage = f"{program} {name}"
    options = parse(usage, name, rest)
    if options.pop("version", False):
        say(f"{'lsmdev' if program == 'lsmdev' else 'mdevctl-list'} {COMPATIBLE}")
        return 0
    with Client() as client:
        store, packaged = find_store(client)
        _HANDLERS[name](Manager(client, store, packaged, warn, complain), options)
    return 0


def _command(program: str, arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the command that is asked for, and what follows it; UsageError for help, version and what is no command."""
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        return name, arguments[1:]
    if name in {"-V", "--version"}:
        raise UsageError(f"mdevctl {COMPATIBLE} ({_version()})", 0)
    if name in {"-h", "--help"}:
        raise UsageError(overview(program), 0)
    if name == "help":
        raise _help(program, arguments[1:])
    if not name:
        raise UsageError(overview(program))
    kind = "unexpected argument '{}' found" if name.startswith("-") else "unrecognized subcommand '{}'"
    raise UsageError(f"error: {kind.format(name)}\n\nUsage: {program} <COMMAND>\n\nFor more information, try '--help'.")


def _help(program: str, words: Sequence[str]) -> UsageError:
    if not words:
        return UsageError(overview(program), 0)
    if words[0] in COMMANDS:
        return UsageError(help_of(f"{program} {words[0]}", words[0]), 0)
    message = f"error: unrecognized subcommand '{words[0]}'"
    return UsageError(f"{message}\n\nUsage: {program} <COMMAND>\n\nFor more information, try '--help'.")


def _version() -> str:
    from mdevkit.version import VERSION

    return f"mdevkit {VERSION}"


def _print_lines(text: object) -> None:
    for line in str(text).split("\n"):
        say(line)


def _with_causes(error: MdevError) -> str:
    cause = error.__cause__
    if cause is None:
        return str(error)
    number = f" (os error {cause.errno})" if isinstance(cause, OSError) else ""
    return f"{error}\n\nCaused by:\n    {reason(cause)}{number}"


def warn(text: str) -> None:
    """Say on stderr what does not end the command."""
    complain(f"WARN: {text}")


# -- what the commands are -------------------------------------------------------------------------------------------------


def _define(manager: Manager, options: dict[str, Any]) -> None:
    _make(manager.define, options)


def _start(manager: Manager, options: dict[str, Any]) -> None:
    _make(manager.start, options)


def _make(make: Callable[..., str], options: dict[str, Any]) -> None:
    """Carry out what makes up a UUID if none is given, and print it then."""
    if "uuid" in options:
        make(**options)
        return
    need_output()
    say_made(make(**options))


def _list(manager: Manager, options: dict[str, Any]) -> None:
    from mdevkit_service.mdevctl.listing import list_devices

    list_devices(manager, warn, **options)


def _types(manager: Manager, options: dict[str, Any]) -> None:
    from mdevkit_service.mdevctl.listing import list_types

    list_types(manager, **options)


_HANDLERS: Final[dict[str, Callable[[Manager, dict[str, Any]], None]]] = {
    "define": _define,
    "undefine": lambda manager, options: manager.undefine(**options),
    "modify": lambda manager, options: manager.modify(**options),
    "start": _start,
    "stop": lambda manager, options: manager.stop(**options),
    "list": _list,
    "types": _types,
    "start-parent-mdevs": lambda manager, options: manager.start_parent(options["PARENT"]),
}

if __name__ == "__main__":
    sys.exit(main())
