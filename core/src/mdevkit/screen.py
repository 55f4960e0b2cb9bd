"""How the picture of a display leaves the process it is in: the screen socket.

A display has an attribute ``screen_path``: a UNIX stream socket that is as private as the device's endpoint. Whoever connects sends
one byte for each look and gets one line of JSON: a `Frame` with the display's memory as a descriptor that cannot write
(SCM_RIGHTS), or ``{"errno": N, "error": SENTENCE}``. The device copies nothing; a device nobody looks at does nothing.

The process at the other end is not trusted: its memory is read with pread(2), which a file that shrinks meanwhile cannot turn into
a signal, and what it says about it is checked. Standard library only. A `Screen` belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from dataclasses import asdict, dataclass
from typing import Final, Self

from mdevkit.errors import MdevError, shown

#: The only format so far: 4 bytes per pixel, blue first, the fourth means nothing (DRM_FORMAT_XRGB8888).
XRGB8888: Final = "XR24"
PIXEL_SIZE: Final = 4

#: What asks for a picture.
LOOK: Final = b"\n"

#: Pixels a side of a picture may have.
MOST_PIXELS: Final = 32768
#: Bytes a row may take; a u16 of pixels in the registers of the cards we know.
_LONGEST_ROW: Final = 1 << 20
#: Bytes a picture may take, twice what one of 7680 times 4320 pixels does.
_LARGEST: Final = 1 << 28
#: Seconds a device gets to answer.
_LIMIT: Final = 10.0
_LONGEST_LINE: Final = 4096


@dataclass(frozen=True)
class Frame:
    """Where a picture is in the memory of a display: `offset` of the first pixel, `stride` from row to row, both in bytes."""

    width: int
    height: int
    stride: int
    offset: int = 0
    format: str = XRGB8888

    @property
    def size(self) -> int:
        """Bytes from the first pixel to the end of the last."""
        return (self.height - 1) * self.stride + self.width * PIXEL_SIZE


@dataclass(frozen=True)
class Picture:
    """A copy of what a display showed: `data` is `Frame.size` bytes, the first pixel first."""

    frame: Frame
    data: bytes


def pack(frame: Frame) -> bytes:
    """Return the line that goes with the descriptor."""
    return json.dumps(asdict(frame)).encode() + b"\n"


def pack_error(error: MdevError) -> bytes:
    """Return the line of a display that has no picture to show."""
    return json.dumps({"errno": error.errno, "error": str(error)}).encode() + b"\n"


class Screen:
    """A connection to the screen socket at `path`: ``with Screen(path) as screen: screen.look()``.

    Raises ENODEV where no display is served, EACCES for somebody else's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = os.fspath(path)
        self._socket: Final = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_LIMIT)
        try:
            self._socket.connect(os.fsencode(self.path))
        except OSError as error:
            self._socket.close()
            gone = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            number = errno.ENODEV if gone else error.errno or errno.EIO
            raise MdevError(number, f"no display can be reached at {self.path}: {error.strerror}", self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def look(self) -> Picture:
        """Return what the display shows now; guest and device may draw meanwhile.

        ENODATA while it shows nothing, ENODEV once the device is gone, ETIMEDOUT, or EPROTO for an answer that is none.
        """
        line, fds = self._ask()
        try:
            frame = self._frame(line)
            if len(fds) != 1:
                raise self._nonsense(f"{len(fds)} descriptors")
            return Picture(frame, self._read(fds[0], frame))
        finally:
            for fd in fds:
                os.close(fd)

    def _ask(self) -> tuple[bytes, list[int]]:
        line, fds = b"", list[int]()
        try:
            self._socket.sendall(LOOK)
            while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                data, new, _, _ = socket.recv_fds(self._socket, _LONGEST_LINE, 4)
                fds += new
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                line += data
        except OSError as error:
            for fd in fds:
                os.close(fd)
            timed_out = isinstance(error, TimeoutError)
            number, why = (errno.ETIMEDOUT, "does not answer") if timed_out else (errno.ENODEV, "is gone")
            raise MdevError(number, f"the display at {self.path} {why}", self.path) from error
        return line, fds

    def _frame(self, line: bytes) -> Frame:
        try:
            facts = json.loads(line)
            if not isinstance(facts, dict):
                raise TypeError(facts)
            if "error" in facts:
                raise self._refusal(**facts)
            frame = Frame(**facts)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._nonsense(shown(line)) from error
        if not _sane(frame):
            raise self._nonsense(f"{frame}")
        if frame.format != XRGB8888:
            raise MdevError(errno.EOPNOTSUPP, f"the display at {self.path} has pixels of format {frame.format!r}", self.path)
        return frame

    def _refusal(self, errno: object = None, error: object = None) -> MdevError:
        # A file system's errno fits into 12 bits, as in Linux's IS_ERR().
        if type(errno) is int and 0 < errno < 4096 and isinstance(error, str):
            return MdevError(errno, error, self.path)
        return self._nonsense(f"the error {shown(str(errno))}: {shown(str(error))}")

    def _read(self, fd: int, frame: Frame) -> bytes:
        """Read the picture; nothing is allocated for one that is not there."""
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise self._nonsense("its memory is no file")
            found = max(0, min(frame.size, status.st_size - frame.offset))
            data = _read(fd, frame) if found == frame.size else b""
        except MdevError:
            raise
        except OSError as error:
            raise self._nonsense(f"its memory cannot be read: {error.strerror}") from error
        if len(data) < frame.size:
            raise self._nonsense(f"{len(data) or found} bytes for {frame}")
        return data

    def _nonsense(self, what: str) -> MdevError:
        return MdevError(errno.EPROTO, f"{self.path} gives no picture: {what}", self.path)


def _sane(frame: Frame) -> bool:
    numbers = (frame.width, frame.height, frame.stride, frame.offset)
    if not all(type(number) is int for number in numbers) or not isinstance(frame.format, str):
        return False
    if not 0 < frame.width <= MOST_PIXELS or not 0 < frame.height <= MOST_PIXELS or not 0 <= frame.offset < 1 << 62:
        return False
    return frame.width * PIXEL_SIZE <= frame.stride <= _LONGEST_ROW and frame.size <= _LARGEST


def _read(fd: int, frame: Frame) -> bytes:
    """Read as much of the picture as is there."""
    parts: list[bytes] = []
    at, end = frame.offset, frame.offset + frame.size
    while at < end and (part := os.pread(fd, end - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]
