"""A display in a terminal, for ``mdevkit console``: two pixels in each character cell, one above the other, in 24-bit colours.

The picture is scaled to the terminal, and drawn again when it or the terminal's size has changed. Where standard output is no
terminal it is written once. One thread, the main one.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from mdevkit.cli.output import complain
from mdevkit.cli.screenshot import image
from mdevkit.errors import MdevError
from mdevkit.screen import Picture, Screen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

#: Ctrl-], which leaves a serial console, too.
ESCAPE: Final = b"\x1d"
#: Seconds between two looks.
INTERVAL: Final = 0.2
#: What a pipe gets, columns and lines.
_PIPE: Final = (80, 24)

#: Upper half block: the foreground is the upper pixel.
_HALVES: Final = "\u2580"
_HOME, _PLAIN, _CLEAR = "\x1b[H", "\x1b[0m", "\x1b[2J"
#: Another screen without a cursor, and back (xterm).
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_INPUT, _OUTPUT = 0, 1


def show(path: str) -> None:
    """Show the display with screen socket `path` until Ctrl-] or Ctrl-C; errors as `Screen`, ENOPKG without Pillow."""
    with Screen(path) as screen:
        if not os.isatty(_OUTPUT):
            _write("\n".join(cells(image(screen.look()), *_PIPE)) + _PLAIN + "\n")
            return
        complain("Ctrl-] leaves")
        with _other_screen():
            _follow(screen)


def cells(picture: Image, columns: int, lines: int) -> list[str]:
    """Return the lines of a terminal of that size that show a picture: as large as it fits, its proportions kept."""
    scale = min(columns / picture.width, 2 * lines / picture.height)
    width, height = max(1, int(picture.width * scale)), max(2, int(picture.height * scale) // 2 * 2)
    data = picture.resize((width, height)).tobytes()
    row = width * 3
    return [_line(data[at : at + row], data[at + row : at + 2 * row]) for at in range(0, height * row, 2 * row)]


def _line(upper: bytes, lower: bytes) -> str:
    """Return a line of cells; colours are said when they change."""
    parts, last = [], b""
    for at in range(0, len(upper), 3):
        colours = upper[at : at + 3] + lower[at : at + 3]
        if colours != last:
            parts.append("\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*colours))
            last = colours
        parts.append(_HALVES)
    return "".join(parts) + _PLAIN


def _follow(screen: Screen) -> None:
    shown: tuple[Picture | None, os.terminal_size] | None = None
    while True:
        now = (_look(screen), os.get_terminal_size(_OUTPUT))
        if now != shown:
            picture, (columns, lines) = now
            drawn = cells(image(picture), columns, lines) if picture else ["the display shows nothing"]
            _write((_PLAIN + _CLEAR if shown is None or shown[1] != now[1] else "") + _HOME + "\r\n".join(drawn))
            shown = now
        if select.select([_INPUT], [], [], INTERVAL)[0]:
            typed = os.read(_INPUT, 64)
            if ESCAPE in typed or not typed:
                return


def _look(screen: Screen) -> Picture | None:
    try:
        return screen.look()
    except MdevError as error:
        if error.errno != errno.ENODATA:
            raise
    return None


@contextmanager
def _other_screen() -> Iterator[None]:
    """Have the terminal to ourselves; it is as it was afterwards."""
    before = termios.tcgetattr(_INPUT) if os.isatty(_INPUT) else None
    try:
        if before:
            tty.setcbreak(_INPUT, termios.TCSADRAIN)
        _write(_ENTER)
        yield
    finally:
        _write(_PLAIN + _LEAVE)
        if before:
            termios.tcsetattr(_INPUT, termios.TCSADRAIN, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
