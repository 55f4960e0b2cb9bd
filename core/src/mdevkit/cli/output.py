"""What commands print: plain columns for people, JSON for programs, one line for an error.

Text that comes from plugins and guests passes `safe` before it reaches a terminal: control characters could make it do things.
"""

from __future__ import annotations

import json
import sys

TYPE_CHECKING = False  # typing would take longer to import than the rest of a quick command
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def safe(text: object) -> str:
    """Return `text` with everything a terminal could act on written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def say(text: object = "") -> None:
    """Print one line."""
    sys.stdout.write(f"{safe(text)}\n")


def complain(text: object) -> None:
    """Print on stderr; only line breaks of our own sentences stay as they are."""
    for line in str(text).split("\n"):
        sys.stderr.write(f"{safe(line)}\n")


def say_json(value: Any) -> None:
    """Print a value as JSON, indented."""
    sys.stdout.write(f"{json.dumps(value, indent=2)}\n")


def say_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns as wide as their longest cell; nothing at all without rows."""
    if not rows:
        return
    cells = [[safe(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
