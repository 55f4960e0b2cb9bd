"""Finds out what of a picture has changed: by comparing, since a guest draws without telling anybody.

The picture is kept in strips of 64 rows, cut into tiles of 64 columns. A strip that has not changed costs one copy and one
comparison of memory. On the loop's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from mmap import mmap
from typing import Final, NamedTuple

from mdevkit.screen import PIXEL_SIZE, Frame

#: Rows and columns of a tile; what ZRLE wants.
SIDE: Final = 64

#: Where a tile is: its number in its strip, and the strip's.
Tile = tuple[int, int]


class Area(NamedTuple):
    """A rectangle in pixels, within one strip."""

    x: int
    y: int
    width: int
    height: int


#: What is shown where nothing is: black.
BLANK: Final = Frame(640, 480, 640 * PIXEL_SIZE)


class Tiles:
    """A copy of the picture, black at first."""

    def __init__(self) -> None:
        self.width = self.height = 0
        self._stride = 0
        self._strips: list[bytes] = []
        self.look(None)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def look(self, scanout: tuple[Frame, mmap] | None) -> set[Tile]:
        """Copy the picture as it is now, and return the tiles that have changed; all of them when its shape has.

        Without a picture the last one's shape goes black.
        """
        if scanout is None:
            return self._go_black()
        frame, memory = scanout
        fresh = (frame.width, frame.height, frame.stride) != (self.width, self.height, self._stride)
        if fresh:
            self._reshape(frame)
        changed: set[Tile] = set()
        for number, start in enumerate(range(0, frame.height, SIDE)):
            at = frame.offset + start * frame.stride
            new = memory[at : at + self._length(number)]
            if new != self._strips[number]:
                changed.update((column, number) for column in self._differing(self._strips[number], new))
                self._strips[number] = new
        return set(self.all()) if fresh else changed

    def _go_black(self) -> set[Tile]:
        shown = (self.width, self.height, self._stride)
        frame = Frame(*shown) if self.width else BLANK
        black = [bytes(length) for length in map(self._length, range(len(self._strips)))]
        if self._strips and self._strips == black:
            return set()
        self._reshape(frame)
        return set(self.all())

    def _reshape(self, frame: Frame) -> None:
        self.width, self.height, self._stride = frame.width, frame.height, frame.stride
        self._strips = [bytes(self._length(number)) for number in range(-(-frame.height // SIDE))]

    def _length(self, number: int) -> int:
        """Bytes of a strip, without what comes after the last row's pixels."""
        rows = min(SIDE, self.height - number * SIDE)
        return (rows - 1) * self._stride + self.width * PIXEL_SIZE

    def _differing(self, old: bytes, new: bytes) -> Iterator[int]:
        """Yield the numbers of the tiles that differ between two versions of a strip."""
        for column, start in enumerate(range(0, self.width * PIXEL_SIZE, SIDE * PIXEL_SIZE)):
            end = min(start + SIDE * PIXEL_SIZE, self.width * PIXEL_SIZE)
            if any(old[at + start : at + end] != new[at + start : at + end] for at in range(0, len(new), self._stride)):
                yield column

    def all(self) -> Iterator[Tile]:
        """Yield every tile."""
        return self.within(0, 0, self.width, self.height)

    def within(self, x: int, y: int, width: int, height: int) -> Iterator[Tile]:
        """Yield the tiles that a rectangle touches; it may leave the picture."""
        right, bottom = min(x + width, self.width), min(y + height, self.height)
        for row in range(y // SIDE, -(-bottom // SIDE)):
            for column in range(x // SIDE, -(-right // SIDE)):
                yield column, row

    def areas(self, tiles: Iterable[Tile], width: int, height: int) -> list[Area]:
        """Return what the tiles cover of the first `width` x `height` pixels; neighbours in a strip are one area."""
        width, height = min(width, self.width), min(height, self.height)
        runs: list[list[int]] = []  # strip, first column, one past the last
        for row, column in sorted((row, column) for column, row in tiles):
            if runs and runs[-1][0] == row and runs[-1][2] == column:
                runs[-1][2] += 1
            else:
                runs.append([row, column, column + 1])
        cut = (
            Area(first * SIDE, row * SIDE, min(last * SIDE, width) - first * SIDE, min((row + 1) * SIDE, height) - row * SIDE)
            for row, first, last in runs
        )
        return [area for area in cut if area.width > 0 and area.height > 0]

    def pixels(self, area: Area) -> bytes:
        """Return the pixels of an area, row after row."""
        strip, first = divmod(area.y, SIDE)
        data = self._strips[strip]
        start, length = first * self._stride + area.x * PIXEL_SIZE, area.width * PIXEL_SIZE
        return b"".join(data[at : at + length] for at in range(start, start + area.height * self._stride, self._stride))
