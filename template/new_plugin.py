"""Starts a plugin of your own: copies the folder ``acme`` beside this file under another name.

Usage: python new_plugin.py NAME [FOLDER]

NAME, of small letters and digits, takes the place of "acme" everywhere: distribution ``mdevkit-NAME``, package ``mdevkit_NAME``,
types ``NAME-1`` ... FOLDER, by default ``mdevkit-NAME`` here, must not exist yet.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TEMPLATE = Path(__file__).parent / "acme"

#: What tests and builds leave in the template.
_LEFTOVERS = {"__pycache__", "dist", "build", ".pytest_cache", ".mypy_cache", ".ruff_cache"}


def new_plugin(name: str, folder: Path) -> None:
    """Write the plugin `name` to `folder`; ValueError for a name that cannot be, FileExistsError if the folder is there."""
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ValueError(f"{name!r} is not a name of small letters and digits that begins with a letter")
    folder.mkdir(parents=True)
    for source in sorted(TEMPLATE.rglob("*")):
        place = source.relative_to(TEMPLATE)
        if source.is_file() and not _LEFTOVERS & set(place.parts):
            target = folder / _renamed(str(place), name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_renamed(source.read_text(), name))


def _renamed(text: str, name: str) -> str:
    for old, new in (("acme", name), ("Acme", name.capitalize()), ("ACME", name.upper())):
        text = text.replace(old, new)
    return text


def main(arguments: list[str]) -> int:
    """Run the command line; 0, 1 for what went wrong, 2 for usage."""
    if len(arguments) not in {1, 2} or arguments[0].startswith("-"):
        sys.stderr.write(f"{__doc__}")
        return 2
    folder = Path(arguments[1] if len(arguments) > 1 else f"mdevkit-{arguments[0]}")
    try:
        new_plugin(arguments[0], folder)
    except FileExistsError:
        sys.stderr.write(f"{folder} exists already\n")
        return 1
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{folder} is ready: cd {folder}; pip install -e .[test]; pytest\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
