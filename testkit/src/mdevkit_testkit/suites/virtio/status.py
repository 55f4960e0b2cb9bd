"""What a device is, its status and features, and what a reset makes of it (virtio 1.2, sections 2.1, 2.2, 2.4 and 3.1)."""

from __future__ import annotations

import errno
from collections import Counter

from mdevkit import MdevType, Registry
from mdevkit_virtio.bus import ClassId, VirtioMdev
from mdevkit_virtio.layout import MAX_SIZE, Feature
from mdevkit_virtio.ops import VirtioOps

from mdevkit_testkit.leaks import Snapshot
from mdevkit_testkit.suites.base import refused
from mdevkit_testkit.suites.virtio.base import VirtioBase, capabilities_of, ops_of
from mdevkit_testkit.suites.virtio.guest import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, Guest

_FAILED = 0x80
_WAY = (ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK)
_APIS = {ClassId.VIRTIO: "virtio_mdev", ClassId.VHOST: "vhost_mdev"}


class DeviceState(VirtioBase):
    """Identity, features, status, reset, independence."""

    def test_class_and_ops_are_set_once(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that create sets class VIRTIO or VHOST, as the device API says, with ops, and that they stay what they are."""
        virtio = VirtioMdev.from_device(self.create(mdev_type, registry))
        api = _APIS[ClassId(virtio.class_id)]
        assert mdev_type.device_api == api, f"the device API is {mdev_type.device_api}, the class that of {api}"
        ops = virtio.get_ops()
        with refused("setting other ops", errno.EBUSY):
            virtio.set_ops(ClassId.VIRTIO, ops)
        assert virtio.get_ops() is ops

    def test_device_can_do_what_is_expected(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that the device has the capabilities the suite's class states as `expected`, if it does, and no others."""
        del registry
        found = sorted(self.look_at(mdev_type.id))
        stated = found if self.expected is None else sorted(self.expected)
        assert found == stated, f"the device has {', '.join(found)}; expected is {', '.join(stated)}"

    def test_device_says_what_it_is(self, ops: VirtioOps) -> None:
        """Checks that device id and vendor id are numbers of 32 bits, that the device id is not 0, and both stay the same."""
        device, vendor = ops.get_device_id(), ops.get_vendor_id()
        assert 0 < device < 1 << 32, f"device id {device}"
        assert 0 <= vendor < 1 << 32, f"vendor id {vendor}"
        ops.set_status(0)
        assert (ops.get_device_id(), ops.get_vendor_id()) == (device, vendor)

    def test_queues_can_be_counted(self, ops: VirtioOps) -> None:
        """Checks that queues 0, 1, ... have a largest size, 32768 at most, and all beyond the last have 0."""
        sizes = [ops.get_vq_num_max(index) for index in range(1024)]
        count = sizes.index(0)
        assert count, "the device has no queue"
        assert not any(sizes[count:]), f"queue {count} does not exist, a later one does"
        assert max(sizes) <= MAX_SIZE, f"a ring of {max(sizes)} descriptors is offered"
        align = ops.get_vq_align()
        assert align > 0, f"alignment of {align}"
        assert not align & (align - 1), f"alignment of {align}"

    def test_features_stay_the_same(self, guest: Guest) -> None:
        """Checks that the device offers VERSION_1, and the same features whatever its state."""
        ops, offered = guest.ops, guest.ops.get_features()
        assert 0 <= offered < 1 << 64, f"features {offered:#x}"
        assert offered & Feature.VERSION_1, f"features {offered:#x} lack VERSION_1 (bit 32)"
        guest.start()
        assert ops.get_features() == offered
        ops.set_status(0)
        assert ops.get_features() == offered

    def test_new_device_is_reset(self, ops: VirtioOps) -> None:
        """Checks that a new device's status is 0, and no queue of it is ready."""
        _check_reset(ops, "new")

    def test_drivers_order_is_taken(self, guest: Guest) -> None:
        """Checks that each status a driver sets on its way to DRIVER_OK reads back, and a repetition changes nothing."""
        ops = guest.ops
        guest.negotiate()
        for status in (FEATURES_OK, DRIVER_OK, DRIVER_OK, DRIVER_OK | _FAILED):
            ops.set_status(status)
            assert ops.get_status() == status

    def test_wrong_status_is_refused(self, guest: Guest) -> None:
        """Checks that EINVAL refuses bits that are none, bits out of order and bits missing that are set, and changes nothing."""
        ops = guest.ops
        wrong = {
            0: (0x10, 0x20 | ACKNOWLEDGE, DRIVER & ~ACKNOWLEDGE, ACKNOWLEDGE | 4, ACKNOWLEDGE | 8, 0x40, 0x100, -1),
            DRIVER: (ACKNOWLEDGE, DRIVER | 0x10, DRIVER | 4, _FAILED),
            FEATURES_OK: (DRIVER, FEATURES_OK | 0x20, FEATURES_OK | 0x40, 0xF00),
            DRIVER_OK: (FEATURES_OK, DRIVER, ACKNOWLEDGE, DRIVER_OK | 0x30),
        }
        for reached, values in wrong.items():
            _climb(guest, reached)
            for value in values:
                with refused(f"status {value:#x} after {reached:#x}", errno.EINVAL):
                    ops.set_status(value)
                found = ops.get_status()
                assert found == reached, f"a status that was refused changed {reached:#x} to {found:#x}"

    def test_features_that_are_not_offered_are_refused(self, guest: Guest) -> None:
        """Checks that features that are not offered are refused with EINVAL, and FEATURES_OK then does not stick."""
        ops = guest.ops
        extra = next(1 << bit for bit in range(64) if not ops.get_features() >> bit & 1)
        _climb(guest, DRIVER)
        with refused(f"features {extra:#x}, which are not offered,", errno.EINVAL):
            ops.set_features(guest.features | extra)
        ops.set_status(FEATURES_OK)
        found = ops.get_status()
        assert found == DRIVER, f"features were refused, and FEATURES_OK sticks: status {found:#x}"

    def test_features_are_final(self, guest: Guest) -> None:
        """Checks that features cannot be set after FEATURES_OK (EBUSY), and can again after a reset."""
        for status in (FEATURES_OK, DRIVER_OK):
            _climb(guest, status)
            with refused(f"setting features with status {status:#x}", errno.EBUSY):
                guest.ops.set_features(guest.features)
        guest.negotiate()

    def test_reset_always_works(self, guest: Guest) -> None:
        """Checks that status 0 makes the device new from every status, with queues that run and after a refusal."""
        for status in (0, *_WAY, DRIVER_OK | _FAILED):
            _climb(guest, status)
            guest.ops.set_status(0)
            _check_reset(guest.ops, f"reset from status {status:#x}")
        guest.start()
        guest.ops.set_status(0)
        _check_reset(guest.ops, "reset with queues that run")
        guest.start()

    def test_devices_share_no_state(self, registry: Registry, mdev_type: MdevType, guest: Guest) -> None:
        """Checks that what a driver does to one device changes nothing in another."""
        if not mdev_type.available_instances:
            return
        other = ops_of(self.create(mdev_type, registry))
        before = capabilities_of(other)
        guest.start()
        _check_reset(other, "untouched")
        assert capabilities_of(other) == before

    def test_drivers_leave_nothing(self, ops: VirtioOps) -> None:
        """Checks that ten drivers, one after the other, leave no descriptor, mapping, thread or child process behind."""
        _drive_once(ops)
        before = _holdings()
        for _ in range(10):
            _drive_once(ops)
        # Numbers of descriptors may change, and threads take their time to end.
        Guest.wait(lambda: _holdings() <= before)
        left = _holdings() - before
        assert not left, f"left behind by 10 drivers: {', '.join(left.elements())}"

    def test_live_device_can_be_removed(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that a device whose driver was killed, with queues that run, is removed and leaves nothing."""
        before = Snapshot.take()
        mdev = self.create(mdev_type, registry)
        guest = Guest(ops_of(mdev))
        guest.start()
        registry.remove(mdev.uuid)
        guest.forget()
        left = before.leaks()
        assert not left, f"left behind by a device that was removed: {', '.join(left)}"


def _drive_once(ops: VirtioOps) -> None:
    guest = Guest(ops)
    try:
        guest.start()
    finally:
        guest.close()


def _holdings() -> Counter[str]:
    """Count descriptors, mappings, threads and children by what they are."""
    now = Snapshot.take()
    return Counter([*now.descriptors.values(), *now.threads.values(), *now.children.values()]) + Counter(now.mappings)


def _climb(guest: Guest, wanted: int) -> None:
    """Bring the device from a reset to a status of a driver's way, and perhaps FAILED."""
    guest.ops.set_status(0)
    for status in _WAY:
        if status & wanted == status:
            if status == FEATURES_OK:
                guest.ops.set_features(guest.features)
            guest.ops.set_status(status)
    if wanted & _FAILED:
        guest.ops.set_status(wanted)


def _check_reset(ops: VirtioOps, how: str) -> None:
    status = ops.get_status()
    assert status == 0, f"a device that is {how} has status {status:#x}"
    index = 0
    while ops.get_vq_num_max(index):
        assert not ops.get_vq_ready(index), f"a device that is {how} has queue {index} ready"
        index += 1
