"""Values that several commands take, checked before anything else is done: a mistake in their form is a usage error."""

from __future__ import annotations

import typer

from mdevkit.errors import MdevError
from mdevkit.names import parse_uuid


def uuid_text(text: str | None) -> str | None:
    """Return a UUID in its usual form; for ``typer.Option(callback=...)``."""
    if text is None:
        return None
    try:
        return str(parse_uuid(text))
    except MdevError as error:
        raise typer.BadParameter(str(error)) from None


def settings(words: list[str] | None) -> list[str]:
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
