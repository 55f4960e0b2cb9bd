"""The command line: one module per subcommand, imported when it is used.

Each module below has `command`, a function typer turns into the subcommand (or a `typer.Typer` with subcommands of its
own). Distributions add subcommands through the entry-point group ``mdevkit.cli``. Errors end here: one line on stderr, the
reason first; exit code 1 for an operation that failed, 2 for usage.

This module imports nothing that takes time: commands of which only the quick way is wanted (`mdevkit.cli.quick`) pass here too.
"""

from __future__ import annotations

from mdevkit.cli.output import complain, unless_broken_off
from mdevkit.errors import MdevError

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Subcommand to the module that has it.
COMMANDS = {
    "attach": "mdevkit.cli.attach",
    "bind": "mdevkit.cli.bind",
    "buses": "mdevkit.cli.buses",
    "console": "mdevkit.cli.console",
    "create": "mdevkit.cli.create",
    "drivers": "mdevkit.cli.drivers",
    "events": "mdevkit.cli.events",
    "list": "mdevkit.cli.list",
    "parents": "mdevkit.cli.parents",
    "plugin": "mdevkit.cli.plugin",
    "plugins": "mdevkit.cli.plugins",
    "remove": "mdevkit.cli.remove",
    "resume": "mdevkit.cli.resume",
    "run": "mdevkit.cli.run",
    "screenshot": "mdevkit.cli.screenshot",
    "service": "mdevkit.cli.service",
    "show": "mdevkit.cli.show",
    "suspend": "mdevkit.cli.suspend",
    "sysfs": "mdevkit.cli.sysfs",
    "top": "mdevkit.cli.top",
    "types": "mdevkit.cli.types",
    "unbind": "mdevkit.cli.unbind",
}

#: Those that ask a running service before anything else is imported.
QUICK = frozenset({"list", "show", "types"})


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    if arguments and arguments[0] in QUICK:
        from mdevkit.cli.quick import answer

        code = _reporting(lambda: answer(arguments))
        if code is not None:
            return code
    return _reporting(lambda: _run(arguments)) or 0


def _run(arguments: Sequence[str]) -> int:
    from mdevkit.cli.app import carry_out, is_usage, usage

    try:
        result = carry_out(arguments)
    except Exception as error:
        if not is_usage(error):
            raise
        return usage(error)
    return result if isinstance(result, int) else 0


def _reporting(work: Callable[[], int | None]) -> int | None:
    """Do the work and return its exit code; errors are told on stderr."""
    try:
        return unless_broken_off(work)
    except MdevError as error:
        complain(f"{error} [{error.name}]")
        return 1
