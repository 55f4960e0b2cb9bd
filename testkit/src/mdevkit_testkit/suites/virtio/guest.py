"""The driver of one virtio device, as the suite, and tests of vendors, need it: it does what it is told, right or wrong.

It calls the ops directly, from the test's thread, and has rings and buffers in a memfd. `Guest` knows any device; `NetPort`
sends and receives frames through a pair of its queues.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Final

from mdevkit_virtio import access
from mdevkit_virtio.driverside import DriverRing, GuestMemory, Segment, make_driver_ring
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.memory import MemoryTable, Region
from mdevkit_virtio.ops import Callback, Status, VirtioOps

#: How long something may take to happen, in seconds.
PATIENCE = 2.0

ACKNOWLEDGE: Final = int(Status.ACKNOWLEDGE)
DRIVER: Final = ACKNOWLEDGE | Status.DRIVER
FEATURES_OK: Final = DRIVER | Status.FEATURES_OK
DRIVER_OK: Final = FEATURES_OK | Status.DRIVER_OK

#: Features of rings that change nothing unless a driver makes use of them.
PLAIN: Final = sum(1 << bit for bit in (24, 27, 32, 33, 36))
_RINGS: Final = sum(Feature)
#: Descriptors of a queue the suite sets up, where the device has as many.
_NUM: Final = 64
_MEMORY: Final = 1 << 21


# The Python engine keeps files open: from before a test looks for leaks, not from the middle of one.
access.open_files()


class Guest:
    """One driver. `features` of those offered are accepted, by default what a driver must have and what changes nothing."""

    def __init__(self, ops: VirtioOps, features: int | None = None, size: int = _MEMORY) -> None:
        self.ops: Final = ops
        self.features: Final = ops.get_features() & (PLAIN if features is None else features)
        self.memory = GuestMemory(size)
        #: What is set up, by queue.
        self.rings: Final[dict[int, DriverRing]] = {}
        self.calls: Final[dict[int, int]] = {}
        #: Kick descriptors the device waits for itself; the others are kicked by call.
        self.kicks: Final[dict[int, int]] = {}
        self._ports: Final[dict[int, NetPort]] = {}
        self._eventfds: Final[list[int]] = []
        self.config_call: Final = self.eventfd()

    def eventfd(self) -> int:
        """Return a new eventfd, which `close` closes."""
        self._eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self._eventfds[-1]

    def table(self, guest: int = 0) -> MemoryTable:
        """Return the memory as a table, at guest address `guest`."""
        return MemoryTable([Region(self.memory.fd, guest, self.memory.size)])

    @property
    def queues(self) -> list[int]:
        """The queues the device has, up to 64."""
        found: list[int] = []
        while len(found) < 64 and self.ops.get_vq_num_max(len(found)):
            found.append(len(found))
        return found

    # -- in a driver's order ------------------------------------------------------------------------------------------------

    def negotiate(self) -> None:
        """Reset the device, choose features and get FEATURES_OK."""
        self._ports.clear()
        for status in (0, ACKNOWLEDGE, DRIVER):
            self.ops.set_status(status)
        self.ops.set_features(self.features)
        self.ops.set_status(FEATURES_OK)
        found = self.ops.get_status()
        assert found == FEATURES_OK, f"with features {self.features:#x} set, FEATURES_OK does not stick: status is {found:#x}"

    def set_up(self, index: int, num: int | None = None, *, kick: bool = True) -> DriverRing:
        """Make a ring and tell the device of it: size, place, callback and, with `kick`, a descriptor for kicks."""
        num = min(_NUM, self.ops.get_vq_num_max(index)) if num is None else num
        ring = self.rings[index] = make_driver_ring(self.memory, num, Feature(self.features & _RINGS), self.ops.get_vq_align())
        self.ops.set_vq_num(index, num)
        self.ops.set_vq_address(index, ring.desc, ring.driver, ring.device)
        self.calls[index] = self.eventfd()
        self.ops.set_vq_cb(index, Callback(trigger=self.calls[index]))
        self.kicks.pop(index, None)
        if kick:
            self.set_kick(index, self.eventfd())
        return ring

    def set_kick(self, index: int, fd: int) -> None:
        """Kick by this eventfd from now on, if the device takes it."""
        self.kicks.pop(index, None)
        if self.ops.set_vq_kick(index, fd):
            self.kicks[index] = fd

    def start(self, queues: Sequence[int] | None = None, *, kick: bool = True, num: int | None = None) -> None:
        """Do everything up to DRIVER_OK, with all queues or these."""
        self.negotiate()
        self.ops.set_map(self.table())
        for index in self.queues if queues is None else queues:
            self.set_up(index, num, kick=kick)
            self.ops.set_vq_ready(index, True)
        self.ops.set_config_cb(Callback(trigger=self.config_call))
        self.ops.set_status(DRIVER_OK)

    # -- buffers --------------------------------------------------------------------------------------------------------------

    def place(self, data: bytes) -> Segment:
        """Return a copy of `data` in memory."""
        at = self.memory.allocate(max(len(data), 1))
        self.memory.map[at : at + len(data)] = data
        return Segment(at, len(data))

    def look(self, segment: Segment) -> bytes:
        """Return what is in memory."""
        return bytes(self.memory.map[segment.address : segment.address + segment.length])

    def room(self, size: int) -> Segment:
        """Return unused memory."""
        return Segment(self.memory.allocate(size), size)

    def port(self, pair: int = 0) -> NetPort:
        """Return a pair of a network device's queues as a port."""
        return self._ports.setdefault(pair, NetPort(self, pair))

    def kick(self, index: int, *, always: bool = False) -> None:
        """Tell the device of new buffers, if it wants that."""
        if not self.rings[index].needs_kick() and not always:
            return
        if index in self.kicks:
            os.eventfd_write(self.kicks[index], 1)
        else:
            self.ops.kick_vq(index)

    # -- waiting --------------------------------------------------------------------------------------------------------------

    @staticmethod
    def wait(reached: Callable[[], object], patience: float | None = None) -> bool:
        """Wait until something is so; false if it does not become so in time."""
        deadline = time.monotonic() + (PATIENCE if patience is None else patience)
        while not reached():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)  # the device tells nobody of some of these
        return True

    @staticmethod
    def signalled(fd: int, patience: float | None = None) -> bool:
        """Wait for an eventfd to be signalled, and clear it."""
        readable, _, _ = select.select([fd], [], [], PATIENCE if patience is None else patience)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        return bool(readable)

    def close(self) -> None:
        """Reset the device, take the memory away and close everything."""
        try:
            self.ops.set_status(0)
            self.ops.set_map(MemoryTable())
        finally:
            self.forget()

    def forget(self) -> None:
        """Close everything without telling the device, as a driver that is killed."""
        self.memory.close()
        self.rings.clear()
        self._ports.clear()
        del self.memory  # whatever still knows this object must not keep the mapping
        for fd in self._eventfds:
            os.close(fd)


class NetPort:
    """Frames through a pair of queues of a network device: queue 2 * `pair` receives, the next one transmits."""

    #: Bytes of the virtio-net header (virtio 1.2, 5.1.6).
    HEADER: Final = 12

    def __init__(self, guest: Guest, pair: int = 0) -> None:
        self.guest: Final = guest
        self.rx, self.tx = 2 * pair, 2 * pair + 1
        #: Frames that have come, behind their headers.
        self.received: list[bytes] = []
        self.sent = 0
        self._free: list[Segment] = []

    def post(self, count: int = 1, size: int = 2048) -> None:
        """Give the device receive buffers, which come back to it when they have been used."""
        for _ in range(count):
            room = self.guest.room(size)
            assert self.guest.rings[self.rx].add([], [room], room), "the receive ring is full"
        self.guest.kick(self.rx)

    def send(self, *frames: bytes, header: bytes = bytes(HEADER)) -> None:
        """Give the device frames; waits while its ring is full."""
        ring = self.guest.rings[self.tx]
        for frame in frames:
            data = header + frame
            room = next((room for room in self._free if room.length >= len(data)), None)
            if room is None:
                room = self.guest.room(max(len(data), 2048))
            else:
                self._free.remove(room)
            self.guest.memory.map[room.address : room.address + len(data)] = data
            # A frame may come back before its transmit buffer does.
            assert ring.free or self.until(lambda: ring.free), "the transmit ring is full"
            ring.add([Segment(room.address, len(data))], [], room)
        self.guest.kick(self.tx)

    def collect(self) -> None:
        """Look at what has come back: used receive buffers are given back, transmit buffers sent from again."""
        for room, length in self.guest.rings[self.rx].collect():
            self.received.append(self.guest.look(Segment(room.address, length)))
            self.guest.rings[self.rx].add([], [room], room)
        self.guest.kick(self.rx)
        for room, _ in self.guest.rings[self.tx].collect():
            self.sent += 1
            self._free.append(room)

    def until(self, reached: Callable[[], object], patience: float | None = None) -> bool:
        """Collect what comes back until something is so; false if it does not become so in time."""

        def look() -> bool:
            self.collect()
            return bool(reached())

        return Guest.wait(look, patience)

    def expect(self, count: int, patience: float | None = None) -> list[bytes]:
        """Return the next `count` frames, without their headers; fewer if they do not come in time."""
        self.until(lambda: len(self.received) >= count, patience)
        frames, self.received = self.received[:count], self.received[count:]
        return [frame[self.HEADER :] for frame in frames]
