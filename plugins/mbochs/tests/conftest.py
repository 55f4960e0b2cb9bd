"""Registries with both parents, devices by message, and a small VNC client of our own to check what others tolerate."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from mdevkit import Mdev, MdevError, Registry
from mdevkit_mbochs.mbochs.parent import MbochsParent
from mdevkit_mbochs.mdpy.parent import MdpyParent
from mdevkit_mbochs.onlookers import acceptor
from mdevkit_mbochs.onlookers.viewer import answer
from mdevkit_vfio.bus import VfioBus, VfioMdev

RAW, ZRLE, DESKTOP_SIZE = 0, 16, -223


class NoMemory:
    """A client that shares no memory; the cards never ask for any."""

    def dma_read(self, iova: int, count: int) -> bytes:
        raise MdevError(errno.ENOTCONN, "no memory")

    def dma_write(self, iova: int, data: bytes) -> None:
        raise MdevError(errno.ENOTCONN, "no memory")


class Card:
    """A device with a client."""

    def __init__(self, mdev: Mdev) -> None:
        self.mdev = mdev
        self.ops: Any = VfioMdev.from_device(mdev).get_ops()
        self.ops.open(NoMemory())

    def dispi(self, index: int, value: int | None = None) -> int:
        """Read a dispi register, or write one."""
        if value is not None:
            self.ops.write(2, 0x500 + 2 * index, value.to_bytes(2, "little"))
        return int.from_bytes(self.ops.read(2, 0x500 + 2 * index, 2), "little")

    def set_mode(
        self, width: int, height: int, virtual: int = 0, x: int = 0, y: int = 0, *, bpp: int = 32, enable: int = 0x41
    ) -> None:
        """Set a mode in the order of bochs-drm."""
        values = ((4, 0), (3, bpp), (1, width), (2, height), (5, 0), (6, virtual), (7, 0), (8, x), (9, y), (4, enable))
        for index, value in values:
            self.dispi(index, value)

    @property
    def memory(self) -> Any:
        return self.ops.bar_memory(0)

    def fill(self, data: bytes, at: int = 0) -> None:
        memory = self.memory
        memory[at : at + len(data)] = data


class VncClient:
    """What a viewer does, step by step; `picture` is what it shows, 4 bytes per pixel."""

    def __init__(self, address: str) -> None:
        if address.startswith("/"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(address)
        else:
            host, _, port = address.rpartition(":")
            self.sock = socket.create_connection((host.strip("[]"), int(port)))
        self.sock.settimeout(10)
        self.width = self.height = 0
        self.picture = bytearray()
        self.pixel_size = 4
        self.encodings: list[int] = []
        self._inflate = zlib.decompressobj()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self.sock.recv(min(count - len(data), 1 << 20))
            if not part:
                raise EOFError(f"{len(data)} of {count} bytes")
            data += part
        return bytes(data)

    def read_reason(self) -> str:
        return self.read(struct.unpack(">I", self.read(4))[0]).decode()

    def greet(self, version: bytes = b"RFB 003.008\n") -> bytes:
        """Exchange versions and return the security types offered."""
        assert self.read(12) == b"RFB 003.008\n"
        self.sock.sendall(version)
        return self.read(4) if version == b"RFB 003.003\n" else self.read(self.read(1)[0])

    def log_in(self, password: bytes | None = None) -> VncClient:
        """Get as far as the picture."""
        types = self.greet()
        assert types == (b"\x01" if password is None else b"\x02")
        self.sock.sendall(types)
        if password is not None:
            self.sock.sendall(answer(password, self.read(16)))
        result = self.read(4)
        if result != bytes(4):
            raise PermissionError(self.read_reason())
        return self.initialise()

    def initialise(self) -> VncClient:
        self.sock.sendall(b"\x01")
        self.width, self.height = struct.unpack(">HH", self.read(4))
        self.format = self.read(16)
        self.name = self.read_reason()
        self.picture = bytearray(self.width * self.height * 4)
        return self

    def set_encodings(self, *encodings: int) -> None:
        self.sock.sendall(struct.pack(f">BxH{len(encodings)}i", 2, len(encodings), *encodings))

    def ask(self, incremental: bool = False) -> None:
        self.sock.sendall(struct.pack(">BBHHHH", 3, incremental, 0, 0, self.width, self.height))

    def update(self) -> list[tuple[int, ...]]:
        """Receive an update and return its rectangles: x, y, width, height, encoding."""
        kind, count = struct.unpack(">BxH", self.read(4))
        assert kind == 0
        return [self._rectangle() for _ in range(count)]

    def look(self, incremental: bool = False) -> list[tuple[int, ...]]:
        self.ask(incremental)
        return self.update()

    def _rectangle(self) -> tuple[int, ...]:
        x, y, width, height, encoding = rectangle = struct.unpack(">HHHHi", self.read(12))
        if encoding == DESKTOP_SIZE:
            self.width, self.height = width, height
            self.picture = bytearray(width * height * 4)
        elif encoding == RAW:
            self._paste(x, y, width, height, self.read(width * height * self.pixel_size))
        else:
            data = self._inflate.decompress(self.read(struct.unpack(">I", self.read(4))[0]))
            self._zrle(x, y, width, height, data)
        return rectangle

    def _zrle(self, x: int, y: int, width: int, height: int, data: bytes) -> None:
        at = 0
        for top in range(0, height, 64):
            for left in range(0, width, 64):
                wide, high = min(64, width - left), min(64, height - top)
                kind = data[at]
                assert kind in (0, 1)
                used = 3 * (wide * high if kind == 0 else 1)
                pixels = data[at + 1 : at + 1 + used] * (1 if kind == 0 else wide * high)
                at += 1 + used
                full = bytearray(wide * high * 4)
                for byte in range(3):
                    full[byte::4] = pixels[byte::3]
                self._paste(x + left, y + top, wide, high, bytes(full))
        assert at == len(data)

    def _paste(self, x: int, y: int, width: int, height: int, data: bytes) -> None:
        if self.pixel_size != 4:
            self.raw = data
            return
        for row in range(height):
            at = ((y + row) * self.width + x) * 4
            self.picture[at : at + width * 4] = data[row * width * 4 : (row + 1) * width * 4]

    @property
    def colours(self) -> bytes:
        """The picture without the bytes that mean nothing."""
        return opaque(bytes(self.picture))


def opaque(pixels: bytes) -> bytes:
    """Set the bytes that mean nothing to 0."""
    data = bytearray(pixels)
    data[3::4] = bytes(len(data) // 4)
    return bytes(data)


@pytest.fixture
def registry(no_leaks: None, runtime_folder: Path) -> Iterator[Registry]:
    with Registry() as registry:
        registry.register_bus(VfioBus())
        registry.register_parent(MbochsParent())
        registry.register_parent(MdpyParent())
        yield registry


@pytest.fixture
def create(registry: Registry) -> Callable[..., Mdev]:
    """Create an unbound device."""

    def make(type_id: str = "mbochs-small", **params: Any) -> Mdev:
        return registry.create(type_id, params=params, bind=False)

    return make


@pytest.fixture
def card(create: Callable[..., Mdev]) -> Iterator[Callable[..., Card]]:
    """Create a device and be its client; all are released afterwards."""
    cards: list[Card] = []

    def make(type_id: str = "mbochs-small", **params: Any) -> Card:
        cards.append(Card(create(type_id, **params)))
        return cards[-1]

    yield make
    for each in cards:
        each.ops.release()


@pytest.fixture
def vnc() -> Iterator[Callable[[str], VncClient]]:
    """Connect a viewer; all are closed afterwards."""
    clients: list[VncClient] = []

    def connect(address: str) -> VncClient:
        clients.append(VncClient(address))
        return clients[-1]

    yield connect
    for each in clients:
        each.sock.close()


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)  # nothing tells of it


@pytest.fixture
def shortage(caplog: pytest.LogCaptureFixture) -> Callable[[str], None]:
    """Let a program connect to a display while this process has no descriptor left, and await three attempts to accept it."""

    def connect(path: str) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as sock:
            taken = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 8, limits[1]))
            try:
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(os.dup(sock.fileno()))
                sock.connect(path)
                until(lambda: len(attempts()) >= 3)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for fd in taken:
                    os.close(fd)
        first, _, third, *_ = attempts()
        assert third - first > 1.5 * acceptor.SHORTAGE_PAUSE, "it does not try all the time"

    def attempts() -> list[float]:
        return [record.created for record in caplog.records if "nobody can look: [Errno 24]" in record.getMessage()]

    return connect


@pytest.fixture
def without_padding() -> Callable[[bytes], bytes]:
    """The helper `opaque`, for test modules."""
    return opaque
