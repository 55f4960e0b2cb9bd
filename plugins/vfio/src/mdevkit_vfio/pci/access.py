"""Splitting of a BAR access, as the kernel's mediated devices do it.

A client may read or write any number of bytes. Parts of a BAR that are memory or belong to the MSI-X table take them
whole; the vendor's registers get the widest naturally aligned accesses that fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class Window(Protocol):
    """A part of a BAR the kit serves itself, from `start` up to `end`; offsets are the BAR's."""

    @property
    def start(self) -> int:
        """First byte."""
        ...

    @property
    def end(self) -> int:
        """One past the last byte."""
        ...

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes within the window."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` within the window."""
        ...


def widths(offset: int, count: int, widest: int) -> Iterator[tuple[int, int]]:
    """Split into (offset, width): the widest of `widest` ... 4, 2, 1 that is aligned and not longer than what is left."""
    end = offset + count
    while offset < end:
        width = widest
        while offset % width or width > end - offset:
            width >>= 1
        yield offset, width
        offset += width


def pieces(windows: Sequence[Window], offset: int, count: int) -> Iterator[tuple[Window | None, int, int]]:
    """Cut into (window, offset, count) at the borders of `windows`, which are in order; None is the vendor's part."""
    end = offset + count
    for window in windows:
        if window.end <= offset:
            continue
        if window.start >= end or offset >= end:
            break
        if offset < window.start:
            yield None, offset, window.start - offset
            offset = window.start
        stop = min(end, window.end)
        yield window, offset, stop - offset
        offset = stop
    if offset < end:
        yield None, offset, end - offset
