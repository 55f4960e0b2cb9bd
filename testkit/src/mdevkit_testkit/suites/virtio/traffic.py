"""What a device does with buffers: when it may, where it may write, and what it does with a driver that breaks the rules.

`VirtioBase.exchange` knows how to make the device under test do something.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, cast

from mdevkit_virtio.driverside import Completion, DriverRing, Segment
from mdevkit_virtio.memory import DirtyLog, MemoryTable, Region
from mdevkit_virtio.ops import Callback, Status, VirtioOps

from mdevkit_testkit.suites.base import tolerated
from mdevkit_testkit.suites.virtio import guest as guest_module
from mdevkit_testkit.suites.virtio.base import RING_FORMATS, VirtioBase, needs
from mdevkit_testkit.suites.virtio.guest import DRIVER_OK, PLAIN, Guest

#: How long a device is watched that must not do anything, in seconds.
_WATCH = 0.05
_PAGE = 4096


class Traffic(VirtioBase):
    """Buffers, live changes, dirty logging, hostile rings."""

    @needs("traffic")
    def test_buffers_are_used_in_every_format(self, ops: VirtioOps, drive: Callable[..., Guest]) -> None:
        """Checks that buffers are used, with each format of rings the device offers, and after a reset."""
        for bits in RING_FORMATS.values():
            if ops.get_features() & bits == bits:
                guest = drive(ops, PLAIN | bits)
                for _ in range(2):
                    guest.start()
                    self.exchange(guest)

    @needs("traffic")
    def test_kicks_by_call_are_enough(self, guest: Guest) -> None:
        """Checks that buffers are used when the driver has no kick descriptor and calls kick_vq."""
        guest.start(kick=False)
        self.exchange(guest)

    def test_nothing_is_touched_before_driver_ok(self, guest: Guest) -> None:
        """Checks that no buffer is used and no memory written before DRIVER_OK, kicks or not."""
        guest.negotiate()
        guest.ops.set_map(guest.table())
        for index in guest.queues:
            guest.set_up(index)
            _fill(guest, index)
            guest.ops.set_vq_ready(index, True)
        _check_untouched(guest, "before DRIVER_OK")

    def test_nothing_is_touched_after_a_stop(self, guest: Guest) -> None:
        """Checks that once set_vq_ready(False), or a reset, has returned no memory is written, kicks or not."""
        guest.start()
        for index in guest.queues:
            guest.ops.set_vq_ready(index, False)
            _fill(guest, index)
        _check_untouched(guest, "after its queues were stopped")
        guest.start()
        guest.ops.set_status(0)
        for index in guest.queues:
            _fill(guest, index)
        _check_untouched(guest, "after a reset")

    @needs("traffic")
    def test_stopped_queue_goes_on_where_it_was(self, guest: Guest) -> None:
        """Checks that queues stopped and started with the state they told go on: no buffer is used twice, none is left."""
        guest.start()
        for _ in range(3):
            self.exchange(guest)
            for index in guest.queues:
                guest.ops.set_vq_ready(index, False)
            states = [guest.ops.get_vq_state(index) for index in guest.queues]
            for index, state in enumerate(states):
                guest.ops.set_vq_state(index, state)
                guest.ops.set_vq_ready(index, True)

    @needs("traffic")
    def test_memory_moves_under_a_live_device(self, guest: Guest) -> None:
        """Checks that a live device goes on in a new table, and touches nothing of the old one once set_map has returned."""
        guest.start()
        self.exchange(guest)
        with ExitStack() as stack:
            copy = os.memfd_create("old", os.MFD_CLOEXEC)
            stack.callback(os.close, copy)
            os.pwrite(copy, guest.memory.map[:], 0)
            guest.ops.set_map(MemoryTable([Region(copy, 0, guest.memory.size)]))
            guest.ops.set_map(guest.table())
            before = os.pread(copy, guest.memory.size, 0)
            self.exchange(guest)
            same = os.pread(copy, guest.memory.size, 0) == before
            assert same, "memory was written that is not the device's any more"

    @needs("traffic")
    def test_callbacks_are_called(self, guest: Guest) -> None:
        """Checks that used buffers are told of, by eventfd and by function, and not by a callback that was taken away."""
        guest.start()
        self.exchange(guest)
        assert any(guest.signalled(fd) for fd in guest.calls.values()), "no eventfd was signalled"
        called = threading.Event()
        for index in guest.queues:
            guest.ops.set_vq_cb(index, Callback(function=called.set))
        called.clear()
        self.exchange(guest)
        assert called.wait(guest_module.PATIENCE), "no function was called"
        for index in guest.queues:
            guest.ops.set_vq_cb(index, None)
        called.clear()
        self.exchange(guest)
        assert not called.wait(_WATCH), "a callback was called that had been taken away"

    @needs("traffic")
    @needs("kick")
    def test_descriptors_change_under_a_live_device(self, guest: Guest) -> None:
        """Checks that a kick descriptor can be replaced, and the old one closed, while the device runs."""
        guest.start()
        for _ in range(3):
            fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in guest.queues]
            for index, fd in enumerate(fds):
                guest.set_kick(index, fd)
            self.exchange(guest)
            for index in guest.queues:
                guest.set_kick(index, guest.eventfd())
            for fd in fds:
                os.close(fd)
            self.exchange(guest)

    @needs("traffic")
    @needs("log")
    def test_everything_written_is_logged(self, guest: Guest) -> None:
        """Checks that every page the device writes is logged, used rings included, and none once logging has ended."""
        guest.start()
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _PAGE)
            rings = _record(guest)
            assert guest.ops.set_log(DirtyLog(fd, _PAGE), guest.queues)
            self.exchange(guest)
            guest.ops.set_log(None)
            written = set[int]().union(*(ring.pages for ring in rings))
            missing = written - _pages(os.pread(fd, _PAGE, 0))
            assert written, "the exchange used no buffer"
            assert not missing, f"the device has written pages {sorted(missing)} and not logged them"
            os.pwrite(fd, bytes(_PAGE), 0)
            self.exchange(guest)
            assert not any(os.pread(fd, _PAGE, 0)), "the device logs after logging has ended"
        finally:
            os.close(fd)

    @needs("traffic")
    def test_broken_ring_needs_a_reset(self, guest: Guest) -> None:
        """Checks that a ring said to have more buffers than can be makes NEEDS_RESET, told by the callback, until a reset."""
        guest.start()
        self.exchange(guest)
        for index, ring in guest.rings.items():
            # The available index (2.7.6).
            index_at = slice(ring.driver + 2, ring.driver + 4)
            claimed = int.from_bytes(guest.memory.map[index_at], "little") + 20000
            guest.memory.map[index_at] = (claimed & 0xFFFF).to_bytes(2, "little")
            guest.kick(index, always=True)
        assert guest.wait(lambda: guest.ops.get_status() & Status.NEEDS_RESET), "the device does not notice a broken ring"
        assert guest.ops.get_status() & ~Status.NEEDS_RESET == DRIVER_OK
        assert guest.signalled(guest.config_call), "nobody told the driver that the device needs a reset"
        guest.start()
        self.exchange(guest)

    @needs("traffic")
    def test_buffers_outside_memory_hurt_nobody(self, guest: Guest) -> None:
        """Checks that buffers at addresses that are not memory do not stop the device from being reset and used again."""
        for _ in range(2):
            guest.start()
            for index in guest.queues:
                for address in (guest.memory.size - 4, 1 << 40, (1 << 64) - 8):
                    guest.rings[index].add([Segment(address, 64)], [Segment(address, 64)], None)
                guest.kick(index, always=True)
            time.sleep(_WATCH)  # in which the device may come across them
            with tolerated("the status of a device with a hostile driver"):
                guest.ops.get_status()
        guest.start()
        self.exchange(guest)

    @needs("traffic")
    def test_idle_costs_no_processor_time(self, guest: Guest) -> None:
        """Checks that a device without traffic sleeps: its threads are not scheduled."""
        guest.start()
        self.exchange(guest)
        assert guest.wait(_sleeps, 10), "threads of the device run although there is nothing to do"


class _Recorded:
    """A driver's ring that notes which pages the device must have written for what came back."""

    def __init__(self, ring: DriverRing) -> None:
        self._ring: Final = ring
        self.pages: Final[set[int]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def add(self, readable: list[Segment], writable: list[Segment], token: object) -> bool:
        """See `DriverRing.add`."""
        return self._ring.add(readable, writable, (writable, token))

    def collect(self) -> list[Completion]:
        """See `DriverRing.collect`."""
        return [self._note(done) for done in self._ring.collect()]

    def _note(self, done: Completion) -> Completion:
        writable, token = done.token
        left = done.length
        for segment in writable:
            part = min(left, segment.length)
            self.pages.update(range(segment.address // _PAGE, -(-(segment.address + part) // _PAGE)))
            left -= part
        # The used index, behind two bytes of flags (2.7.8).
        self.pages.add((self._ring.device + 2) // _PAGE)
        return Completion(token, done.length)


def _record(guest: Guest) -> list[_Recorded]:
    recorded = {index: _Recorded(ring) for index, ring in guest.rings.items()}
    guest.rings.update(cast("dict[int, DriverRing]", recorded))
    return list(recorded.values())


def _pages(bits: bytes) -> set[int]:
    return {8 * byte + bit for byte, value in enumerate(bits) for bit in range(8) if value >> bit & 1}


def _fill(guest: Guest, index: int) -> None:
    """Make a buffer available to read, and one to write, in a queue that must not use them."""
    guest.rings[index].add([guest.place(b"unread")], [guest.room(64)], None)


def _check_untouched(guest: Guest, when: str) -> None:
    """Kick every queue, and check that no byte of memory changes."""
    before = bytes(guest.memory.map)
    for index in guest.queues:
        guest.kick(index, always=True)
    time.sleep(_WATCH)  # in which nothing may happen
    same = bytes(guest.memory.map) == before
    assert same, f"the device writes memory {when}"


def _sleeps() -> bool:
    """Tell whether no thread but this one is scheduled for a while."""
    before = _switches()
    time.sleep(0.2)  # in which nothing may happen
    return _switches() == before


def _switches() -> dict[str, list[str]]:
    """Return how often each thread of the process has been scheduled, but for this one."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            with suppress(OSError):
                found[task.name] = [line for line in (task / "status").read_text().splitlines() if "ctxt_switches" in line]
    return found
