"""One VNC viewer: what it has said, what it wants, and what it is sent (RFC 6143). Bytes in and bytes out; no sockets, no time.

A viewer is not trusted: whatever it sends, it takes a bounded amount of memory and ends, at worst, with an `RfbError`. Keys,
pointer and clipboard are read and forgotten, since a display has none. On the loop's thread.
"""

from __future__ import annotations

import hmac
import os
import zlib
from collections.abc import Generator
from functools import cached_property
from typing import Final

from mdevkit.errors import shown

from mdevkit_mbochs.onlookers import rfb
from mdevkit_mbochs.onlookers.des import BLOCK, encrypt
from mdevkit_mbochs.onlookers.pixels import OURS, Converter, PixelFormat
from mdevkit_mbochs.onlookers.rfb import ClientMessage, Encoding, RfbError, Security
from mdevkit_mbochs.onlookers.tiles import Area, Tile, Tiles

#: Yields how many bytes are wanted next, and gets exactly those.
_Talk = Generator[int, bytes, None]
#: Left, top, right and bottom.
_Box = tuple[int, int, int, int]

#: How much of a clipboard is taken at once; it is thrown away.
_CHUNK: Final = 1 << 16


class Viewer:
    """A viewer of `tiles`. `name` is what it shows in its title, `password` what it must know, `refusal` why it is kept out."""

    def __init__(self, tiles: Tiles, name: str, password: bytes | None = None, refusal: str = "") -> None:
        #: What waits to be sent.
        self.out = bytearray(rfb.GREETING)
        #: What is to be sent after a pause, and then the connection closed: set when the password was wrong.
        self.last_words = b""
        #: Nothing more is to be read.
        self.ended = False
        #: Whether it has been let in.
        self.ready = False
        #: Whether it waits for changes.
        self.wants = False
        #: What it has not seen yet.
        self.dirty: set[Tile] = set()
        self._tiles: Final = tiles
        self._name: Final = name
        self._password: Final = password
        self._refusal: Final = refusal
        self._shape = (0, 0)
        self._resizable = self._zrle = False
        #: What it has asked for, followed once an update: it could say more in a moment than can be done in a minute.
        self._format = OURS
        self._again: _Box | None = None
        self._convert = Converter(OURS)
        self._received = bytearray()
        self._talk = self._begin()
        self._needed = next(self._talk)

    def feed(self, data: bytes) -> None:
        """Take what has come in; RfbError ends it."""
        self._received += data
        while not self.ended and len(self._received) >= self._needed:
            part = bytes(self._received[: self._needed])
            del self._received[: self._needed]
            self._needed = self._talk.send(part)

    # -- what it says ------------------------------------------------------------------------------------------------

    def _begin(self) -> _Talk:
        version = yield len(rfb.GREETING)
        if not version.startswith(b"RFB "):
            raise RfbError(f"it speaks no RFB: {shown(version)}")
        minor = rfb.MINORS.get(version, rfb.OLDEST)
        if self._refusal:
            self._refuse(minor)
        else:
            yield from self._secure(minor)
        while self.ended:
            yield 1
        yield 1  # whether others may look too: they always may
        width, height = self._shape = self._tiles.size
        self.out += rfb.server_init(width, height, OURS.pack(), self._name)
        self.ready = True
        while True:
            kind = (yield 1)[0]
            yield from self._message(kind)

    def _refuse(self, minor: int) -> None:
        none = bytes(4) if minor == rfb.OLDEST else bytes(1)
        self.out += none + rfb.reason(self._refusal)
        self.ended = True

    def _secure(self, minor: int) -> _Talk:
        """Agree on a security type (7.1.2), and hear the password if there is one (7.2)."""
        kind = Security.NONE if self._password is None else Security.VNC
        if minor == rfb.OLDEST:
            self.out += kind.to_bytes(4, "big")
        else:
            self.out += bytes((1, kind))
            if (chosen := (yield 1)[0]) != kind:
                raise RfbError(f"it chose security type {chosen}, which was not offered")
        if self._password is not None:
            challenge = os.urandom(rfb.CHALLENGE_SIZE)
            self.out += challenge
            response = yield rfb.CHALLENGE_SIZE
            if not hmac.compare_digest(response, answer(self._password, challenge)):
                self.last_words = rfb.FAILED + (rfb.reason("wrong password") if minor == 8 else b"")
                self.ended = True
                return
        if self._password is not None or minor == 8:
            self.out += rfb.OK

    def _message(self, kind: int) -> _Talk:
        if kind == ClientMessage.SET_PIXEL_FORMAT:
            self._format = PixelFormat.unpack((yield rfb.PIXEL_FORMAT.size)[3:])
        elif kind == ClientMessage.SET_ENCODINGS:
            (count,) = rfb.SET_ENCODINGS.unpack((yield rfb.SET_ENCODINGS.size))
            self._set_encodings((yield 4 * count))
        elif kind == ClientMessage.UPDATE_REQUEST:
            incremental, *place = rfb.UPDATE_REQUEST.unpack((yield rfb.UPDATE_REQUEST.size))
            self.wants = True
            if not incremental:
                self._show_again(*place)
        elif kind == ClientMessage.KEY_EVENT:
            yield rfb.KEY_EVENT_SIZE
        elif kind == ClientMessage.POINTER_EVENT:
            yield rfb.POINTER_EVENT_SIZE
        elif kind == ClientMessage.CUT_TEXT:
            (left,) = rfb.CUT_TEXT.unpack((yield rfb.CUT_TEXT.size))
            while left:
                left -= len((yield min(left, _CHUNK)))
        else:
            raise RfbError(f"message {kind} is not known")

    def _show_again(self, x: int, y: int, width: int, height: int) -> None:
        """Take note of a rectangle to be sent even if nothing has changed; of several, the smallest around all."""
        left, top, right, bottom = self._again or (x, y, x, y)
        self._again = min(left, x), min(top, y), max(right, x + width), max(bottom, y + height)

    def _set_encodings(self, data: bytes) -> None:
        wanted = [int.from_bytes(data[at : at + 4], "big", signed=True) for at in range(0, len(data), 4)]
        self._resizable = Encoding.DESKTOP_SIZE in wanted
        # Whichever of the two it likes better; raw is always possible.
        known = [encoding for encoding in wanted if encoding in {Encoding.RAW, Encoding.ZRLE}]
        self._zrle = bool(known) and known[0] == Encoding.ZRLE

    # -- what it is sent ---------------------------------------------------------------------------------------------

    def update(self) -> bool:
        """Put what it has not seen into `out`, if it wants it and there is any; tell whether there was."""
        if not self.wants or self.out:
            return False
        self._follow()
        if self._shape != self._tiles.size and self._resizable:
            self._shape = self._tiles.size
            self.dirty = set(self._tiles.all())
            self.out += rfb.update(1) + rfb.rectangle(0, 0, *self._shape, Encoding.DESKTOP_SIZE)
            self.wants = False
            return True
        areas = self._tiles.areas(self.dirty, *self._shape)
        self.dirty.clear()
        if not areas:
            return False
        encode = self._zrle_rectangle if self._zrle else self._raw_rectangle
        self.out += rfb.update(len(areas)) + b"".join(map(encode, areas))
        self.wants = False
        return True

    def _follow(self) -> None:
        """Do what it has said since the last update."""
        if self._format != self._convert.wanted:
            self._convert = Converter(self._format)
        if self._again is not None:
            left, top, right, bottom = self._again
            self.dirty.update(self._tiles.within(left, top, right - left, bottom - top))
            self._again = None

    @cached_property
    def _deflate(self) -> zlib._Compress:
        """One for all its rectangles (7.7.6): a quarter of a megabyte, which it need not have that never gets so far."""
        return zlib.compressobj(1)

    def _raw_rectangle(self, area: Area) -> bytes:
        return rfb.rectangle(*area, Encoding.RAW) + self._convert.convert(self._tiles.pixels(area))

    def _zrle_rectangle(self, area: Area) -> bytes:
        """Send tiles of one colour as such, others as they are: zlib finds the rest."""
        tiles = (self._zrle_tile(self._tiles.pixels(tile)) for tile in _split(area))
        data = self._deflate.compress(b"".join(tiles)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return rfb.rectangle(*area, Encoding.ZRLE) + rfb.sized(data)

    def _zrle_tile(self, pixels: bytes) -> bytes:
        data = self._convert.compact(pixels)
        first = data[: self._convert.compact_size]
        if data == first * (len(pixels) // 4):
            return rfb.ZRLE_SOLID + first
        return rfb.ZRLE_RAW + data


def _split(area: Area) -> list[Area]:
    """Cut an area, which lies within one strip, into ZRLE's tiles."""
    end = area.x + area.width
    return [area._replace(x=x, width=min(rfb.ZRLE_TILE, end - x)) for x in range(area.x, end, rfb.ZRLE_TILE)]


def answer(password: bytes, challenge: bytes) -> bytes:
    """Return what proves that a viewer knows the password (7.2.2): DES with the bits of each of its bytes in reverse."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password[:BLOCK].ljust(BLOCK, b"\0"))
    return b"".join(encrypt(key, challenge[at : at + BLOCK]) for at in range(0, len(challenge), BLOCK))
