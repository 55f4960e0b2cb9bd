"""How queues are set up, started and stopped (virtio 1.2, section 2.6; the twenty ops)."""

from __future__ import annotations

import errno
from collections.abc import Callable

from mdevkit_virtio.layout import VringBase
from mdevkit_virtio.memory import MemoryTable
from mdevkit_virtio.ops import Callback, VirtioOps

from mdevkit_testkit.suites.base import refused, tolerated
from mdevkit_testkit.suites.virtio.base import RING_FORMATS, VirtioBase, needs
from mdevkit_testkit.suites.virtio.guest import DRIVER_OK, PLAIN, Guest


class Queues(VirtioBase):
    """Size, place, state, callbacks, readiness."""

    def test_queues_beyond_the_last_are_refused(self, guest: Guest) -> None:
        """Checks that every op refuses a queue that is not there with EINVAL."""
        ops, beyond = guest.ops, len(guest.queues)
        guest.negotiate()
        calls: dict[str, Callable[[], object]] = {
            "set_vq_num": lambda: ops.set_vq_num(beyond, 8),
            "set_vq_address": lambda: ops.set_vq_address(beyond, 0, 0, 0),
            "set_vq_state": lambda: ops.set_vq_state(beyond, 0),
            "get_vq_state": lambda: ops.get_vq_state(beyond),
            "set_vq_cb": lambda: ops.set_vq_cb(beyond, None),
            "set_vq_ready": lambda: ops.set_vq_ready(beyond, True),
            "get_vq_ready": lambda: ops.get_vq_ready(beyond),
            "kick_vq": lambda: ops.kick_vq(beyond),
        }
        for name, call in calls.items():
            with refused(f"{name} of queue {beyond}", errno.EINVAL):
                call()

    def test_sizes_that_cannot_be_are_refused(self, guest: Guest) -> None:
        """Checks that ring sizes of 0, beyond the largest, or not a power of two for a split ring are refused with EINVAL."""
        guest.negotiate()
        for index in guest.queues:
            most = guest.ops.get_vq_num_max(index)
            for num in (0, -1, most + 1, 1 << 16, 1 << 32, *([3] if most > 3 else [])):
                with refused(f"a ring of {num} descriptors", errno.EINVAL):
                    guest.ops.set_vq_num(index, num)
            guest.ops.set_vq_num(index, 1 << most.bit_length() - 1)

    def test_queue_becomes_ready_and_stops(self, guest: Guest) -> None:
        """Checks that a queue is ready after it was made so, twice too, and is not any more after it was stopped."""
        guest.negotiate()
        guest.ops.set_map(guest.table())
        for index in guest.queues:
            guest.set_up(index)
            for ready in (False, True, True, False, False, True):
                guest.ops.set_vq_ready(index, ready)
                found = guest.ops.get_vq_ready(index)
                assert found is ready, f"queue {index}, set to ready {ready}, says {found}"

    def test_rings_outside_memory_are_refused(self, guest: Guest) -> None:
        """Checks that a queue at addresses that are not memory, or not aligned, does not become ready: EFAULT or EINVAL."""
        ops = guest.ops
        guest.negotiate()
        ops.set_map(guest.table())
        ring = guest.set_up(0)
        good = (ring.desc, ring.driver, ring.device)
        for position in range(3):
            for address in (guest.memory.size, 1 << 40, (1 << 64) - 16, good[position] + 1):
                wrong = tuple(address if at == position else place for at, place in enumerate(good))
                with refused(f"a ring at {wrong}", errno.EFAULT, errno.EINVAL):
                    ops.set_vq_address(0, *wrong)
                    ops.set_vq_ready(0, True)
                assert not ops.get_vq_ready(0), f"a queue that was refused is ready, at {wrong}"
        ops.set_vq_address(0, *good)
        ops.set_vq_ready(0, True)
        assert ops.get_vq_ready(0)

    def test_ready_queue_cannot_be_changed(self, guest: Guest) -> None:
        """Checks that size, place and state of a queue that is ready are refused with EBUSY, before and after DRIVER_OK."""
        ops = guest.ops
        guest.negotiate()
        ops.set_map(guest.table())
        ring = guest.set_up(0)
        ops.set_vq_ready(0, True)
        for _ in range(2):
            with refused("set_vq_num of a ready queue", errno.EBUSY):
                ops.set_vq_num(0, ring.num)
            with refused("set_vq_address of a ready queue", errno.EBUSY):
                ops.set_vq_address(0, ring.desc, ring.driver, ring.device)
            with refused("set_vq_state of a ready queue", errno.EBUSY):
                ops.set_vq_state(0, 0)
            assert ops.get_vq_ready(0)
            ops.set_status(DRIVER_OK)

    def test_state_is_what_was_set(self, guest: Guest) -> None:
        """Checks that the state of a queue reads as it was set, and a reset makes it the beginning."""
        for name, bits in RING_FORMATS.items():
            if guest.ops.get_features() & bits == bits:
                features = guest.features | bits
                for index in guest.queues:
                    self._check_state(guest.ops, index, features, name)

    @staticmethod
    def _check_state(ops: VirtioOps, index: int, features: int, name: str) -> None:
        packed = bool(features & RING_FORMATS["packed"])
        beginning = VringBase().encode(packed=packed)
        for state in (beginning, VringBase(3, 3, False, False).encode(packed=packed)):
            for status in (0, 1, 3):
                ops.set_status(status)
            ops.set_features(features)
            ops.set_status(11)
            found = ops.get_vq_state(index)
            assert found == beginning, f"queue {index} ({name}) begins at {found:#x}, not {beginning:#x}"
            ops.set_vq_state(index, state)
            found = ops.get_vq_state(index)
            assert found == state, f"the state of queue {index} ({name}) was set to {state:#x} and reads {found:#x}"

    def test_kicks_of_idle_queues_are_ignored(self, guest: Guest) -> None:
        """Checks that a kick does nothing while the queue is not ready, the device is not, or there is nothing to do."""
        stages: list[Callable[[], object]] = [lambda: None, guest.negotiate, guest.start, lambda: guest.ops.set_status(0)]
        for stage in stages:
            stage()
            status = guest.ops.get_status()
            for index in guest.queues:
                guest.ops.kick_vq(index)
            assert guest.ops.get_status() == status

    def test_callbacks_can_change_at_any_time(self, guest: Guest) -> None:
        """Checks that callbacks, of eventfds and of functions, can be set and taken away before, in and after traffic."""
        ops = guest.ops
        for _ in range(2):
            for index in guest.queues:
                for callback in (Callback(trigger=guest.config_call), Callback(function=lambda: None), None):
                    ops.set_vq_cb(index, callback)
                    ops.set_config_cb(callback)
            guest.start()

    def test_memory_can_change_at_any_time(self, guest: Guest) -> None:
        """Checks that a table of memory can be set before, in and after use, and queues stay ready in a new one."""
        guest.ops.set_map(MemoryTable())
        guest.start()
        for _ in range(3):
            guest.ops.set_map(guest.table())
            assert all(guest.ops.get_vq_ready(index) for index in guest.queues), "a queue stopped when the memory changed"
            assert guest.ops.get_status() == DRIVER_OK
        guest.ops.set_status(0)
        guest.ops.set_map(MemoryTable())

    def test_ring_without_memory_breaks(self, guest: Guest) -> None:
        """Checks that taking away the memory of live rings is EFAULT and NEEDS_RESET, told by the configuration's callback."""
        guest.start()
        with refused("a table without the rings in it", errno.EFAULT):
            guest.ops.set_map(MemoryTable())
        status = guest.ops.get_status()
        assert status == DRIVER_OK | 0x40, f"the rings are gone, and the status is {status:#x}"
        assert guest.signalled(guest.config_call), "nobody told the driver that its rings are gone"
        guest.start()
        assert guest.ops.get_status() == DRIVER_OK

    def test_kick_descriptor_is_taken_or_not(self, guest: Guest) -> None:
        """Checks that set_vq_kick says whether the device waits for kicks itself, at any time, with a descriptor and without."""
        for stage in (guest.negotiate, guest.start):
            stage()
            for index in guest.queues:
                for fd in (guest.eventfd(), -1):
                    found = guest.ops.set_vq_kick(index, fd)
                    assert isinstance(found, bool), f"set_vq_kick returned {found!r}"

    @needs("packed")
    def test_packed_ring_may_have_any_size(self, guest: Guest) -> None:
        """Checks that a packed ring of a size that is no power of two can be used."""
        packed = Guest(guest.ops, PLAIN | RING_FORMATS["packed"])
        try:
            packed.negotiate()
            packed.ops.set_map(packed.table())
            for index in packed.queues:
                if packed.ops.get_vq_num_max(index) >= 5:
                    packed.set_up(index, 5)
                    packed.ops.set_vq_ready(index, True)
        finally:
            packed.close()

    def test_errors_leave_the_device_usable(self, guest: Guest) -> None:
        """Checks that numbers no driver would send are refused with an error, not a bug, and a driver can work afterwards."""
        ops = guest.ops
        guest.negotiate()
        for number in (-1, 1 << 16, 1 << 32, 1 << 64, 1 << 80):
            for call in (
                lambda number=number: ops.set_vq_num(0, number),
                lambda number=number: ops.set_vq_state(0, number),
                lambda number=number: ops.set_vq_address(0, number, number, number),
                lambda number=number: ops.set_status(number),
                lambda number=number: ops.get_vq_ready(number),
                lambda number=number: ops.get_config(number, 4),
                lambda number=number: ops.get_config(0, number),
            ):
                with tolerated(f"a call with {number:#x}"):
                    call()
        guest.start()
        assert ops.get_status() == DRIVER_OK
