"""The quick way through ``list``, ``show`` and ``types``: a running service has all they tell, so nothing else is imported.

Takes the command lines people and programs usually give; any other is left to typer, which explains what is wrong with it.
"""

from __future__ import annotations

from mdevkit.cli.listing import list_devices, list_types, show_device
from mdevkit.cli.output import is_utf8
from mdevkit.cli.remote import running_service

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

#: Command to its options: what they are called in code, and whether a value follows.
_OPTIONS: dict[str, dict[str, tuple[str, bool]]] = {
    "list": {
        "-d": ("defined", False),
        "--defined": ("defined", False),
        "--tree": ("tree", False),
        "-v": ("verbose", False),
        "--verbose": ("verbose", False),
        "--json": ("as_json", False),
        "--dumpjson": ("dump", False),
        "-u": ("uuid", True),
        "--uuid": ("uuid", True),
        "-p": ("parent", True),
        "--parent": ("parent", True),
    },
    "show": {"--json": ("as_json", False)},
    "types": {
        "--json": ("as_json", False),
        "--dumpjson": ("as_json", False),
        "-p": ("parent", True),
        "--parent": ("parent", True),
    },
}


def answer(arguments: Sequence[str]) -> int | None:
    """Carry out a command line if this is the place for it, and return its exit code; else None."""
    parsed = _parse(_OPTIONS[arguments[0]], arguments[1:])
    if parsed is None or not all(map(is_utf8, arguments)):
        return None
    words, options = parsed
    if len(words) != (arguments[0] == "show") or len({"tree", "as_json", "dump"} & set(options)) > 1:
        return None
    if arguments[0] == "list":
        list_devices(**options)
    elif arguments[0] == "show":
        show_device(words[0], **options)
    else:
        return _types(options)
    return 0


def _types(options: dict[str, Any]) -> int | None:
    service = running_service()
    if service is None:
        return None
    wanted = options.pop("parent", None)
    parents = [parent for parent in service.get("/v1/parents") if wanted in {None, parent["name"]}]
    if not parents:
        return None
    list_types(parents, **options)
    return 0


def _parse(known: dict[str, tuple[str, bool]], arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]] | None:
    """Return words and options; None for what is not plainly right."""
    words: list[str] = []
    options: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            words.append(argument)
            continue
        if option not in known or known[option][0] in options:
            return None
        name, takes = known[option]
        if takes and not equals:
            value = next(rest, "")
        if takes is not bool(value) or value.startswith("-"):
            return None
        options[name] = value if takes else True
    return words, options
