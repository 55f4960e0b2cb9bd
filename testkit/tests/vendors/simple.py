"""Two devices and a parent that keep every contract, written so that each of their rules can be broken in one place."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from mdevkit import Attribute, Choice, Int, Mdev, MdevError, MdevType, ParentOps, Pool, Text, hookimpl
from mdevkit_vfio.bus import VfioMdev
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.pci import Bar, Msix, PciDevice, PciIds, SparseArea
from mdevkit_vfio.uapi import MigrationFlag

PAGE = 4096
IDS = PciIds(vendor=0xBAD0, device=0x0001)


class Registers(PciDevice):
    """64 bytes of registers, INTx and four MSI vectors, and migration with all there is."""

    magic: ClassVar[bytes] = b"simple01"

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(IDS, {0: Bar(64)}, name=name, **{"interrupt_pin": 1, "msi_vectors": 4} | options)
        self.state = bytearray(64)
        self.migration = Migration(
            MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY,
            save=self.save,
            load=self.load,
            header=lambda: self.magic,
            lock=self.lock,
        )

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return int.from_bytes(self.state[offset : offset + size], "little")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.state[offset : offset + size] = value.to_bytes(size, "little")

    def device_reset(self) -> None:
        self.state[:] = bytes(64)

    def save(self) -> bytes:
        return self.magic + bytes(self.state)

    def load(self, data: bytes) -> None:
        if not data.startswith(self.magic):
            raise MdevError(errno.EINVAL, "not a stream of this device")
        self.state[:] = data[len(self.magic) :]


class Mapped(PciDevice):
    """A 64-bit BAR of which the second half is mapped, and MSI-X."""

    def __init__(self, name: str) -> None:
        bars = {0: Bar(4 * PAGE, "mem64", mapped=True, areas=(SparseArea(2 * PAGE, 2 * PAGE),)), 2: Bar(PAGE)}
        super().__init__(IDS, bars, msix=Msix(4, bar=2), name=name)


def _show(name: str) -> Any:
    return lambda mdev: mdev.drvdata[name]


def _store(name: str) -> Any:
    return lambda mdev, value: mdev.drvdata.update({name: value})


ATTRIBUTES = (
    Attribute("level", Int(0, 9), "how much", _show("level"), _store("level"), create=True, default=5),
    Attribute("mode", Choice(("fast", "slow")), "how", _show("mode"), create=True, default="slow"),
    Attribute("label", Text("[a-z]*"), "for people", _show("label"), _store("label"), create=True, default=""),
)


class SimpleParent(ParentOps):
    """Five slots, of which a device takes one."""

    name = "simple"
    devices = (("regs", Registers), ("mapped", Mapped))
    bus = "mdev"
    api = "vfio-pci"
    attributes_of_devices: Sequence[Attribute[Any]] = ATTRIBUTES

    def __init__(self) -> None:
        self.slots = Pool("slots", 5)
        self.types = [self.make_type(group) for group, _ in self.devices]

    def make_type(self, group: str) -> MdevType:
        costs = {self.slots: 1}
        return MdevType(group, self.bus, self.api, costs=costs, device_attributes=self.attributes_of_devices)

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        self.build(mdev, params)

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        self.take_down(mdev)

    def build(self, mdev: Any, params: Mapping[str, Any]) -> None:
        mdev.drvdata = dict(params)
        VfioMdev.from_device(mdev).set_ops(dict(self.devices)[mdev.type.group](f"simple {mdev.uuid}"))

    def take_down(self, mdev: Any) -> None:
        pass


def fails(**tests: str) -> Callable[[type], type]:
    """Mark a test class as that of a broken vendor: each test named has to fail, with a report that matches its pattern."""

    def mark(cls: Any) -> type:
        cls.fails = tests
        return cls

    return mark
