"""The device status: which steps a driver may take, and what it reads."""

import errno

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio.ops import Status
from mdevkit_virtio.status import DeviceStatus

ORDER = (1, 3, 11, 15)


def reach(*values):
    status = DeviceStatus()
    for value in values:
        status.add(status.check(value))
    return status


def test_a_drivers_way():
    status = DeviceStatus()
    added = []
    for value in ORDER:
        added.append(status.check(value))
        status.add(added[-1])
    assert added == [Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK]
    assert status.value == 15


@pytest.mark.parametrize("start", range(5))
def test_every_step_from_every_status(start):
    """Allowed is exactly what adds bits, in their order, and NEEDS_RESET not at all."""
    status = reach(*ORDER[:start])
    have = status.value
    for value in range(1, 256):
        if value & ~0x8F == 0 and value & have == have and value & 15 in {0, *ORDER}:
            assert status.check(value) == value & ~have
        else:
            with pytest.raises(MdevError) as caught:
                status.check(value)
            assert caught.value.errno == errno.EINVAL
    assert status.value == have


TEXTS = [
    ((), 2, "status 0x2 has DRIVER without ACKNOWLEDGE"),
    ((1, 3), 1, "status 0x1 lacks DRIVER: only a reset clears bits"),
    ((1, 3, 11, 15), 3, "status 0x3 lacks DRIVER_OK, FEATURES_OK: only a reset clears bits"),
    ((), 0x11, "status 0x11 has bits that are none, or not a driver's to set"),
    ((), 0x41, "status 0x41 has NEEDS_RESET, which is the device's to set"),
    ((), 256, "status 0x100 has bits that are none, or not a driver's to set"),
    ((), -1, "status -0x1 has bits that are none, or not a driver's to set"),
]


@pytest.mark.parametrize(("before", "value", "text"), TEXTS)
def test_refusals_say_why(before, value, text):
    with pytest.raises(MdevError) as caught:
        reach(*before).check(value)
    assert str(caught.value) == text


def test_a_broken_device_says_so_until_it_is_reset():
    status = reach(*ORDER)
    assert status.breaks()
    assert not status.breaks(), "the driver has been told"
    assert status.value == 15 | 0x40
    status.add(status.check(0x40 | 15 | 0x80))
    assert status.value == 0x40 | 15 | 0x80
    assert status.check(15 | 0x80) == 0, "NEEDS_RESET is not the driver's to keep"
    status.reset()
    assert status.value == 0


def test_before_driver_ok_nobody_is_told():
    assert not reach(*ORDER[:3]).breaks()


def test_failed_may_follow_anything():
    for count in range(5):
        status = reach(*ORDER[:count])
        status.add(status.check(status.value | 0x80))
        assert Status.FAILED in status
