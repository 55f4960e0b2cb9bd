"""What the parts of the virtio suite share: devices with a driver, what a device can do, and ways to use one.

Ops are called from pytest's thread, which stands for the driver's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any, ClassVar, Final

import pytest
from mdevkit import Mdev, MdevType, Registry
from mdevkit_virtio.bus import VirtioMdev, VirtioMdevBus
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.ops import DeviceId, VirtioOps

from mdevkit_testkit.suites.base import Suite
from mdevkit_testkit.suites.virtio.guest import PLAIN, Guest

#: What a device may be able to do, in words; the first is the suite's own.
_CAPABILITIES: Final = {
    "traffic": "use that the suite knows (override `exchange`)",
    "config": "configuration space",
    "writable": "configuration space that a driver can write",
    "packed": "packed rings",
    "kick": "way to wait for kicks itself",
    "log": "dirty log",
}

#: Feature bits of rings: a device with one of them is used with it too.
RING_FORMATS: Final = {
    "split": 0,
    "packed": int(Feature.RING_PACKED),
    "event": int(Feature.EVENT_IDX | Feature.INDIRECT_DESC),
    "in order": int(Feature.IN_ORDER),
}

#: Frames of one exchange with a network device.
_FRAMES: Final = 20
#: Largest configuration space there is (virtio over PCI leaves room for less).
_CONFIG_LIMIT: Final = 4096


class VirtioBase(Suite):
    """Fixtures for the parts of the suite."""

    #: What the devices can do, exactly: "traffic", "config", "writable", "packed", "kick", "log". Tests of other things are left
    #: out then. Not stated, what is found out decides what is skipped.
    expected: ClassVar[Collection[str] | None] = None

    def exchange(self, guest: Guest) -> None:
        """Make the device use buffers of its queues, which run, and check what comes of it.

        The suite knows network devices: each frame sent must be used up, and those that come back be whole. A vendor of
        another device overrides this; without it tests of traffic are skipped.
        """
        port = guest.port()
        port.post(_FRAMES - guest.rings[port.rx].outstanding)
        frames = [bytes([number]) * (60 + number) for number in range(_FRAMES)]
        before = port.sent
        port.send(*frames)
        assert port.until(lambda: port.sent == before + _FRAMES), f"the device used {port.sent - before} of {_FRAMES} frames"
        got = port.expect(_FRAMES, 0.01 if not port.received else None)
        assert not got or got == frames, "frames came back that are not those that were sent"

    @classmethod
    def wanted(cls, type_: MdevType) -> str:
        """See `Suite.wanted`."""
        return "" if type_.bus == VirtioMdevBus.name else f"devices of {type_} are on bus {type_.bus}, not of the virtio class"

    @pytest.fixture(autouse=True)
    def skip_what_devices_lack(self, request: pytest.FixtureRequest) -> None:
        """Skip a test of something the type's devices do not have."""
        for mark in request.node.iter_markers("mdevkit_needs"):
            (capability,) = mark.args
            if capability not in self.capabilities(request.getfixturevalue("type_id")):
                pytest.skip(f"the device has no {_CAPABILITIES[capability]}")

    @pytest.fixture
    def ops(self, registry: Registry, mdev_type: MdevType) -> VirtioOps:
        """Return a new device's ops."""
        return ops_of(self.create(mdev_type, registry))

    @pytest.fixture
    def drive(self, registry: Registry) -> Iterator[Callable[..., Guest]]:
        """Give a driver to a device: ``drive(ops, features)``; it leaves before the device goes."""
        del registry  # outlives the drivers
        with ExitStack() as stack:

            def make(ops: VirtioOps, features: int = PLAIN) -> Guest:
                guest = Guest(ops, features)
                stack.callback(guest.close)
                return guest

            yield make

    @pytest.fixture
    def guest(self, ops: VirtioOps, drive: Callable[..., Guest]) -> Guest:
        """Return the driver of a new device; it has done nothing yet."""
        return drive(ops)

    @classmethod
    def capabilities(cls, type_id: str) -> frozenset[str]:
        """Return what devices of a type can do, in the words of `expected`."""
        return _capabilities(cls.look_at, type_id)

    @classmethod
    def look_at(cls, type_id: str) -> frozenset[str]:
        """Make a device, and ask it."""
        with cls.make_registry() as registry:
            ops = ops_of(cls().create(registry.type(type_id), registry))
            known = ops.get_device_id() == DeviceId.NET or cls.exchange is not VirtioBase.exchange
            return capabilities_of(ops) | ({"traffic"} if known else set())


def needs(capability: str) -> pytest.MarkDecorator:
    """Mark a test as one of something that not every device has; `capability` as in `VirtioBase.expected`."""
    return pytest.mark.mdevkit_needs(capability)


@cache
def _capabilities(look: Callable[[str], frozenset[str]], type_id: str) -> frozenset[str]:
    """Remember what `VirtioBase.look_at` has found."""
    return look(type_id)


def ops_of(mdev: Mdev) -> VirtioOps:
    """Return a device's ops."""
    return VirtioMdev.from_device(mdev).get_ops()


def capabilities_of(ops: VirtioOps) -> frozenset[str]:
    """Return what a device can do, in the words of `VirtioBase.expected`, but for "traffic"."""
    found = set()
    if config_size(ops):
        found.add("config")
    if writable(ops):
        found.add("writable")
    if ops.get_features() & Feature.RING_PACKED:
        found.add("packed")
    if ops.get_vq_num_max(0) and ops.set_vq_kick(0, -1):
        found.add("kick")
    guest = Guest(ops)
    try:
        if ops.set_log(_log_of(guest)):
            found.add("log")
        ops.set_log(None)
    finally:
        guest.close()
    return frozenset(found)


def _log_of(guest: Guest) -> Any:
    from mdevkit_virtio.memory import DirtyLog

    return DirtyLog(guest.memory.fd, 4096)


def config_size(ops: VirtioOps) -> int:
    """Return how many bytes of configuration space can be read, one by one."""
    for offset in range(_CONFIG_LIMIT):
        try:
            ops.get_config(offset, 1)
        except OSError:
            return offset
    return _CONFIG_LIMIT


def writable(ops: VirtioOps) -> list[int]:
    """Return which bytes a driver may write: writes to each what it reads there."""
    found = []
    for offset in range(config_size(ops)):
        with suppress(OSError):
            ops.set_config(offset, ops.get_config(offset, 1))
            found.append(offset)
    return found
