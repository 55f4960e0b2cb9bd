"""What a device says of itself, and that every byte of it can be read and written."""

from __future__ import annotations

import errno

from mdevkit import Mdev, MdevType, Registry
from mdevkit_vfio.bus import VFIO, VfioMdev
from mdevkit_vfio.ops import GfxPlane, VfioOps
from mdevkit_vfio.uapi import PCI_NUM_IRQS, PCI_NUM_REGIONS, Irq, IrqFlag, Region, RegionFlag
from mdevkit_vfio.uapi import Device as DeviceFlag

from mdevkit_testkit.suites.base import refused, tolerated
from mdevkit_testkit.suites.vfio.base import (
    WIDTHS,
    VfioBase,
    capabilities_of,
    fingerprint,
    irq_count,
    look,
    offsets,
    places,
    region_name,
    regions,
    scribble,
)

#: The most QEMU 11 takes.
_MAX_REGIONS = 100
_MAX_IRQS = 50


class Info(VfioBase):
    """GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, and region access."""

    def test_class_and_ops_are_set_once(self, registry: Registry, mdev_type: MdevType) -> None:
        """Checks that create sets class VFIO with ops, and that they stay what they are."""
        mdev: Mdev = self.create(mdev_type, registry)
        assert mdev.class_id == VFIO
        vfio = VfioMdev.from_device(mdev)
        ops = vfio.get_ops()
        with refused("setting other ops", errno.EBUSY):
            vfio.set_ops(ops)
        assert vfio.get_ops() is ops

    def test_device_can_do_what_is_expected(self, ops: VfioOps) -> None:
        """Checks that the device has the capabilities the suite's class states as `expected`, if it does, and no others."""
        found = sorted(capabilities_of(ops))
        stated = found if self.expected is None else sorted(self.expected)
        assert found == stated, f"the device says it has {', '.join(found)}; expected is {', '.join(stated)}"

    def test_device_info(self, ops: VfioOps) -> None:
        """Checks that GET_INFO describes a PCI device of a size clients take, and says the same twice."""
        info = ops.info()
        assert info.flags & DeviceFlag.PCI, f"device info lacks the flag PCI: {info}"
        assert PCI_NUM_REGIONS <= info.num_regions <= _MAX_REGIONS, f"{info.num_regions} regions"
        assert PCI_NUM_IRQS <= info.num_irqs <= _MAX_IRQS, f"{info.num_irqs} interrupt indexes"
        assert ops.info() == info

    def test_region_info(self, ops: VfioOps) -> None:
        """Checks that GET_REGION_INFO answers for every index, is consistent, and refuses an index beyond with EINVAL."""
        count = ops.info().num_regions
        for index in range(count):
            info, name = ops.region_info(index), region_name(index)
            assert info.size >= 0, f"{name} has {info.size} bytes"
            mappable = bool(info.flags & RegionFlag.MMAP)
            assert mappable == (info.mapping is not None), f"{name}: flags {info.flags!r} with mapping {info.mapping}"
            assert info.size or not mappable, f"{name} does not exist and can be mapped"
        for index in (count, 0xFFFFFFFF):
            with refused(f"GET_REGION_INFO of index {index}", errno.EINVAL):
                ops.region_info(index)

    def test_configuration_space_has_a_known_size(self, ops: VfioOps) -> None:
        """Checks that region CONFIG has 256 bytes, or 4,096 for PCI Express, and can be read and written."""
        info = ops.region_info(Region.CONFIG)
        assert info.size in {256, 4096}, f"configuration space has {info.size} bytes"
        assert info.flags & (RegionFlag.READ | RegionFlag.WRITE) == RegionFlag.READ | RegionFlag.WRITE

    def test_irq_info(self, ops: VfioOps) -> None:
        """Checks that GET_IRQ_INFO answers or refuses every index with EINVAL, and that counts are those PCI allows."""
        most = {Irq.INTX: 1, Irq.MSI: 32, Irq.MSIX: 2048, Irq.ERR: 1, Irq.REQ: 1}
        for index in range(ops.info().num_irqs):
            count = irq_count(ops, index)
            assert 0 <= count <= most.get(Irq(index), 2048), f"{count} interrupts at index {Irq(index).name}"
            if count:
                assert ops.irq_info(index).flags & IrqFlag.EVENTFD, f"index {Irq(index).name} cannot signal an eventfd"
        for index in (ops.info().num_irqs, 0xFFFFFFFF):
            with refused(f"GET_IRQ_INFO of index {index}", errno.EINVAL):
                ops.irq_info(index)

    def test_every_byte_can_be_read_in_every_width(self, ops: VfioOps) -> None:
        """Checks that a read of 1, 2, 4 or 8 bytes at any offset gives as many bytes, or an OSError."""
        for index, info in regions(ops).items():
            for width in WIDTHS:
                for offset in offsets(info.size):
                    if offset + width <= info.size:
                        look(ops.read, index, offset, width)

    def test_configuration_space_can_be_read_at_once(self, ops: VfioOps) -> None:
        """Checks that configuration space is read whole by one access, as QEMU does, and says the same byte by byte."""
        size = ops.region_info(Region.CONFIG).size
        whole = ops.read(Region.CONFIG, 0, size)
        assert whole == b"".join(ops.read(Region.CONFIG, offset, 1) for offset in range(size))

    def test_device_survives_random_writes(self, ops: VfioOps) -> None:
        """Checks that writes of random values, of every width, all over the device never raise anything but an OSError."""
        identity = ops.read(Region.CONFIG, 0, 4)
        for seed in range(4):
            scribble(ops, seed)
        fingerprint(ops.read, places(ops))
        assert ops.read(Region.CONFIG, 0, 4) == identity, "the device's ids changed"

    def test_display_requests_are_answered(self, ops: VfioOps) -> None:
        """Checks that a device answers the two requests about its display, with ENOTTY where it has none."""
        with tolerated("QUERY_GFX_PLANE") as refusals:
            plane = ops.query_gfx_plane(0)
            assert isinstance(plane, GfxPlane), f"QUERY_GFX_PLANE was answered with {plane!r}"
        assert {error.errno for error in refusals} <= {errno.ENOTTY, errno.EINVAL}, f"QUERY_GFX_PLANE failed with {refusals}"
        with refused("GET_GFX_DMABUF of an unknown id", errno.ENOTTY, errno.ENOENT):
            ops.gfx_dmabuf(0x7FFFFFFF)
