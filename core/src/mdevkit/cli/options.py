"""Values that several commands take, checked before anything else is done: a mistake in their form is a usage error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mdevkit.cli.complete import types
from mdevkit.errors import MdevError
from mdevkit.names import parse_uuid


def _uuid_text(text: str | None) -> str | None:
    """Return a UUID in its usual form; for ``typer.Option(callback=...)``."""
    if text is None:
        return None
    try:
        return str(parse_uuid(text))
    except MdevError as error:
        raise typer.BadParameter(str(error)) from None


def _settings(words: list[str] | None) -> list[str]:
    """Check that every word is of the form NAME=VALUE and no name comes twice; for ``typer.Option(callback=...)``."""
    names = set()
    for word in words or []:
        name, equals, _ = word.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{word!r} is not of the form NAME=VALUE")
        if name in names:
            raise typer.BadParameter(f"{name} is given twice")
        names.add(name)
    return words or []


def endpoint_path(text: str | None) -> str | None:
    """Return a socket's path made absolute; a word before it, as in ``connect:PATH``, is the driver's to understand."""
    if text is None:
        return None
    word, colon, path = text.partition(":") if re.match("[a-z]+:", text) else ("", "", text)
    return f"{word}{colon}{Path(path).absolute()}"


TypeId = Annotated[
    str, typer.Argument(metavar="TYPE", autocompletion=types, help="A type as `mdevkit types` shows it, e.g. mtty-2.")
]
Parent = Annotated[str | None, typer.Option("--parent", "-p", metavar="PARENT", help="Create it on this parent.")]
Uuid = Annotated[
    str | None,
    typer.Option("--uuid", "-u", metavar="UUID", callback=_uuid_text, help="The device's UUID; made up by default."),
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", callback=_settings, help="Set an attribute.")]
Socket = Annotated[
    str | None, typer.Option(metavar="PATH", help="Where to make the device's socket; connect:PATH for one its client makes.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
