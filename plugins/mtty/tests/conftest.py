"""Cards with a client, and what the client holds."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable, Iterator

import pytest
from mdevkit.errors import MdevError
from mdevkit_mtty.model import MttyDevice, SampleDevice, SerialDevice
from mdevkit_vfio.ops import IrqRequest
from mdevkit_vfio.uapi import Irq, IrqSet, Region


class NoMemory:
    """A client that shares no memory; the card never asks for any."""

    def dma_read(self, iova: int, count: int) -> bytes:
        raise MdevError(errno.ENOTCONN, "no memory")

    def dma_write(self, iova: int, data: bytes) -> None:
        raise MdevError(errno.ENOTCONN, "no memory")


class Client:
    """A client of one card: registers by the byte, configuration space, interrupts counted by an eventfd."""

    def __init__(self, device: SerialDevice) -> None:
        self.device = device
        self._eventfds: dict[Irq, int] = {}
        device.open(NoMemory())

    def restart(self) -> None:
        """Leave and come back, as after the end of a hypervisor."""
        self.device.release()
        self.device.open(NoMemory())

    def read(self, port: int, register: int, size: int = 1) -> int:
        return int.from_bytes(self.device.read(port, register, size), "little")

    def write(self, port: int, register: int, value: int, size: int = 1) -> None:
        self.device.write(port, register, value.to_bytes(size, "little"))

    def config(self, offset: int, count: int) -> bytes:
        return self.device.read(Region.CONFIG, offset, count)

    def write_config(self, offset: int, data: bytes) -> None:
        self.device.write(Region.CONFIG, offset, data)

    def arm(self, index: Irq) -> None:
        """Have an interrupt signalled; again after a new start."""
        if index not in self._eventfds:
            self._eventfds[index] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        eventfd = self._eventfds[index]
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.device.set_irqs(IrqRequest(flags, index, 0, 1, fds=[os.dup(eventfd)]))

    def fired(self, index: Irq, timeout: float = 0) -> int:
        """How often an interrupt was signalled since the last time."""
        eventfd = self._eventfds[index]
        select.select([eventfd], [], [], timeout)
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(eventfd)
        return 0

    def mask(self, masked: bool) -> None:
        action = IrqSet.ACTION_MASK if masked else IrqSet.ACTION_UNMASK
        self.device.set_irqs(IrqRequest(IrqSet.DATA_NONE | action, Irq.INTX, 0, 1))

    def receive(self, port: int) -> bytes:
        """Read until nothing is there."""
        data = bytearray()
        while self.read(port, 5) & 1:
            data.append(self.read(port, 0))
        return bytes(data)

    def receive_exactly(self, port: int, count: int) -> bytes:
        """Poll until `count` bytes are there; fails after 10 s."""
        data = bytearray()
        deadline = time.monotonic() + 10
        while len(data) < count:
            assert time.monotonic() < deadline, f"{len(data)} of {count} bytes after 10 s"
            data += self.receive(port)
        return bytes(data)

    def leave(self) -> None:
        self.device.release()
        for eventfd in self._eventfds.values():
            os.close(eventfd)


@pytest.fixture
def connect(no_leaks: None) -> Iterator[Callable[[SerialDevice], Client]]:
    """Give a client to a device; both are gone after the test."""
    with contextlib.ExitStack() as stack:

        def make(device: SerialDevice) -> Client:
            stack.callback(device.close)
            client = Client(device)
            stack.callback(client.leave)
            return client

        yield make


@pytest.fixture
def card(connect: Callable[[SerialDevice], Client]) -> Client:
    """A client of a card with two 16550A."""
    return connect(MttyDevice(2))


@pytest.fixture
def sample(connect: Callable[[SerialDevice], Client]) -> Client:
    """A client of a card as Linux has it."""
    return connect(SampleDevice(2))
