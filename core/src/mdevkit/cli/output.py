"""What commands print: columns for people, in colours on a terminal, JSON for programs, one line for an error.

Text that comes from plugins and guests passes `safe` before it reaches a terminal: control characters could make it do things.
Output that cannot be written, to a full disk say, is an `MdevError` like any other, whoever prints (`unless_broken_off`).
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys

from mdevkit.errors import MdevError

TYPE_CHECKING = False  # typing would take longer to import than the rest of a quick command
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TextIO, TypeVar

    from _typeshed import ReadableBuffer

    Code = TypeVar("Code")


_INPUT, _OUTPUT, _ERRORS = 0, 1, 2


def safe(text: object) -> str:
    """Return `text` with everything a terminal could act on written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def is_utf8(text: str) -> bool:
    """Tell whether a word of the command line was UTF-8; one that was not, only paths may be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_bytes(text: str) -> str:
    """Return a word that is not UTF-8 with the bytes that spoil it as escapes."""
    return os.fsencode(text).decode(errors="backslashreplace")


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
    try:
        for line in str(text).split("\n"):
            sys.stderr.write(f"{safe(line)}\n")
    except OSError:
        # There is nobody left to tell; the exit code still does.
        _discard(_ERRORS)


class _Output(io.FileIO):
    """Standard output, whose errors are told from all others."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, as any file; an `MdevError` when it cannot be done, BrokenPipeError when nobody reads any more."""
        try:
            written: int | None = super().write(data)
        except OSError as error:
            raise unwritable(error) from None
        if written is None:  # somebody has made it non-blocking, and it is full
            raise unwritable(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
        return written


def unwritable(error: OSError) -> OSError:
    """Return the error for output that cannot be written; a reader who has seen enough is none of ours."""
    if isinstance(error, BrokenPipeError):
        return error
    return MdevError(error.errno or errno.EIO, f"cannot write to standard output: {error.strerror}")


def need_output() -> None:
    """Refuse to begin what would end in output nobody sees: EBADF when standard output is closed."""
    from fcntl import F_GETFL, fcntl

    if isinstance(_raw(sys.stdout), _Output) and fcntl(_OUTPUT, F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise unwritable(OSError(errno.EBADF, os.strerror(errno.EBADF)))


def say_made(uuid: str, *, value: Any = None) -> None:
    """Print the UUID of what has just been made, or `value` as JSON; if that fails, the error tells it."""
    try:
        say(uuid) if value is None else say_json(value)
        sys.stdout.flush()
    except MdevError as error:
        raise MdevError(error.errno or errno.EIO, f"{error}; the UUID is {uuid}", uuid) from None


def _discard(number: int) -> None:
    """Let whatever else is written to a descriptor go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _raw(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _open_streams() -> None:
    """Have standard output as `_Output`, in which what an encoding lacks is escaped, and something in place of what is closed."""
    if sys.stdout is not sys.__stdout__:
        return  # somebody collects what we print, or this has been done
    for number in (_INPUT, _OUTPUT, _ERRORS):
        try:
            os.fstat(number)
        except OSError:
            # A socket of ours that got the number would be taken for it. What is printed must not vanish unnoticed.
            os.open(os.devnull, os.O_WRONLY if number == _ERRORS else os.O_RDONLY)
    sys.stdin = sys.stdin or open(_INPUT, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(_ERRORS, "w", closefd=False)  # noqa: SIM115
    raw = _Output(_OUTPUT, "wb", closefd=False)
    before = sys.stdout
    unbuffered = before is not None and before.write_through  # as PYTHONUNBUFFERED has it
    sys.stdout = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        before.encoding if before else "utf-8",
        "backslashreplace",
        line_buffering=before is not None and before.line_buffering,
        write_through=unbuffered,
    )


def unless_broken_off(work: Callable[[], Code]) -> Code | int:
    """Return what `work` returns; the exit code when whoever reads what we print goes away, or Ctrl-C comes.

    An `MdevError` of `work` comes out of here, or the one for output that could not be written.
    """
    _open_streams()
    lost = None
    try:
        try:
            code = work()
        finally:
            lost = _flushed()
    except BrokenPipeError:
        return 1  # whoever read our output has seen enough
    except KeyboardInterrupt:
        return 130
    if lost is None:
        return code
    if isinstance(lost, BrokenPipeError):
        return 1
    raise lost


def _flushed() -> OSError | None:
    """Write what is still in a buffer; return what keeps it from being written. Then it is given up."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(_OUTPUT)  # the interpreter will try it once more when it ends
        return error
    return None


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
