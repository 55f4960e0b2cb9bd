"""What commands print: columns for people, in colours on a terminal, JSON for programs, one line for an error.

Text that comes from plugins and guests passes `safe` before it reaches a terminal: control characters could make it do things.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False  # typing would take longer to import than the rest of a quick command
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    Code = TypeVar("Code")


def safe(text: object) -> str:
    """Return `text` with everything a terminal could act on written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


class Painted:
    """Text that a terminal shows in a style, an SGR parameter of ECMA-48; plain elsewhere, as it is with ``NO_COLOR`` set."""

    def __init__(self, text: object, style: str) -> None:
        self.text = safe(text)
        self.style = style

    def __str__(self) -> str:
        return f"\x1b[{self.style}m{self.text}\x1b[0m" if self.text and self.style and _styled() else self.text


BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"

#: A device's or host's state to how it looks; others look like anything else.
_LOOKS = {"bound": GREEN, "running": GREEN, "failed": RED, "deferred": YELLOW, "starting": YELLOW, "unbound": DIM}


def state(word: str) -> Painted:
    """Return the word for a state in its colour."""
    return Painted(word, _LOOKS.get(word, ""))


def _styled() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(*parts: object) -> None:
    """Print one line of parts that follow each other."""
    sys.stdout.write("".join(str(part) if isinstance(part, Painted) else safe(part) for part in parts) + "\n")


def complain(text: object) -> None:
    """Print on stderr; only line breaks of our own sentences stay as they are."""
    for line in str(text).split("\n"):
        sys.stderr.write(f"{safe(line)}\n")


def unless_broken_off(work: Callable[[], Code]) -> Code | int:
    """Return what `work` returns; the exit code when whoever reads what we print goes away, or Ctrl-C comes."""
    try:
        code = work()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def say_json(value: Any) -> None:
    """Print a value as JSON, indented."""
    sys.stdout.write(f"{json.dumps(value, indent=2)}\n")


def say_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns as wide as their longest cell; nothing at all without rows."""
    if not rows:
        return
    cells = [[cell if isinstance(cell, Painted) else Painted(cell, "") for cell in row] for row in rows]
    cells.insert(0, [Painted(name, BOLD) for name in header])
    widths = [max(len(row[column].text) for row in cells) for column in range(len(header))]
    for row in cells:
        while row and not row[-1].text:
            row.pop()
        gaps = [" " * (width - len(cell.text) + 2) for cell, width in zip(row, widths, strict=False)]
        say(*(part for pair in zip(row, [*gaps[:-1], ""], strict=True) for part in pair))
