"""Who a device's state belongs to: to that device alone, and to one client at a time.

What can be seen of the state is what the registers read (`base.fingerprint`). Places where two fresh devices differ, such as
serial numbers and clocks, are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from mdevkit import MdevType, Registry
from mdevkit_vfio.ops import VfioOps

from mdevkit_testkit.leaks import Snapshot
from mdevkit_testkit.suites.vfio.base import (
    GuestMemory,
    VfioBase,
    differences,
    fingerprint,
    in_memory,
    map_or_close,
    needs,
    places,
    scribble,
    volatile,
)

_SEEDS = range(3)


class DeviceState(VfioBase):
    """Reset, release, and independence of devices."""

    @needs("reset")
    def test_reset_restores_the_state_after_create(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that RESET brings every register back to what a new device reads, whatever was written before.

        Memory a client can map is left out: it is its own.
        """
        fresh, other = self.fresh(mdev_type, registry), self.fresh(mdev_type, registry)
        with self.opened(self.create(mdev_type, registry)) as ops:
            ignored = volatile(fresh, other) | in_memory(ops, fresh)
            for seed in _SEEDS:
                scribble(ops, seed)
                ops.reset()
                found = differences(fresh, fingerprint(ops.read, fresh), ignored)
                assert not found, f"after RESET {found}"

    def test_next_client_finds_a_new_device(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that after a client has left, the next one finds every register as a new device has it."""
        fresh, other = self.fresh(mdev_type, registry), self.fresh(mdev_type, registry)
        mdev = self.create(mdev_type, registry)
        for seed in _SEEDS:
            with self.opened(mdev) as ops:
                found = differences(fresh, fingerprint(ops.read, fresh), volatile(fresh, other))
                assert not found, f"the {'next' if seed else 'first'} client finds that {found}"
                scribble(ops, seed)

    def test_devices_share_no_state(self, ops: VfioOps, make_ops: Callable[[], VfioOps]) -> None:
        """Checks that writes to one device, and its reset, change nothing in another."""
        other = make_ops()
        where = places(other)
        first, before = fingerprint(other.read, where), fingerprint(other.read, where)
        for seed in _SEEDS:
            scribble(ops, seed)
        ops.reset()
        found = differences(before, fingerprint(other.read, where), volatile(first, before))
        assert not found, f"writes to another device changed this one: {found}"

    def test_opens_leave_nothing(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that ten clients, one after the other, leave no descriptor, mapping, thread or child process behind."""
        mdev = self.create(mdev_type, registry)
        with self.opened(mdev) as ops:
            scribble(ops, 0)
        before = Snapshot.take()
        for seed in range(10):
            with self.opened(mdev) as ops:
                scribble(ops, seed)
        left = before.leaks()
        assert not left, f"left behind by 10 clients: {', '.join(left)}"

    def test_release_drops_what_the_client_gave(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that the descriptors of a client's memory are closed when it leaves, and its maps are gone."""
        mdev = self.create(mdev_type, registry)
        with self.opened(mdev):
            pass
        guest = GuestMemory()
        before = Snapshot.take()
        with self.opened(mdev) as ops:
            map_or_close(ops, guest.region(iova=1 << 40))
        left = before.leaks()
        assert not left, f"left behind by a client that had mapped memory: {', '.join(left)}"
        os.close(guest.fd)
        with self.opened(mdev) as ops:
            again = GuestMemory()
            try:
                map_or_close(ops, again.region(iova=1 << 40))
            finally:
                again.close()
