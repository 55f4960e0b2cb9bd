"""Devices that break one rule of the VFIO class each. `fails`: the tests that must notice, and what they must say."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import Any

from mdevkit import MdevError
from mdevkit_testkit import VfioSuite
from mdevkit_vfio.ops import DeviceInfo, IrqInfo, Mapping, RegionInfo, SparseArea
from mdevkit_vfio.uapi import Device, Irq, IrqFlag, IrqSet, MigrationState, Region, RegionFlag
from simple import PAGE, Mapped, Registers, SimpleParent, fails


class Suite(VfioSuite):
    """The VFIO suite on a parent with one type, whose devices are of class `device`."""

    device: type

    @classmethod
    def factory(cls) -> SimpleParent:
        # pytest calls it on the class: see `Suite.parents`.
        parent = SimpleParent()
        parent.devices = (("regs", cls.device),)
        parent.types = [parent.make_type("regs")]
        return parent


# -- what a device says ----------------------------------------------------------------------------------------------------


@fails(
    test_class_and_ops_are_set_once="assert 2 == 1",
)
class TestOtherClass(VfioSuite):
    class factory(SimpleParent):
        devices = (("regs", Registers),)

        def build(self, mdev: Any, params: Any) -> None:
            mdev._set_class(2, Registers("other"))


@fails(
    test_device_can_do_what_is_expected="says it has intx, migration, msi, precopy, reset; expected is mapped, msi, msix",
)
class TestLacksExpected(Suite):
    device = Registers
    expected = ("msi", "msix", "mapped")


@fails(
    test_device_info="device info lacks the flag PCI",
)
class TestNotPci(Suite):
    class device(Registers):
        def info(self) -> DeviceInfo:
            return replace(super().info(), flags=Device.RESET)


@fails(
    test_region_info="GET_REGION_INFO of index 9 was not refused",
)
class TestEndlessRegions(Suite):
    class device(Registers):
        def region_info(self, index: int) -> RegionInfo:
            return super().region_info(index) if index < 9 else RegionInfo(RegionFlag(0), 0)


@fails(
    test_configuration_space_has_a_known_size="configuration space has 255 bytes",
)
class TestOddConfigSize(Suite):
    class device(Registers):
        def region_info(self, index: int) -> RegionInfo:
            info = super().region_info(index)
            return replace(info, size=255) if index == Region.CONFIG else info


@fails(
    test_irq_info="33 interrupts at index MSI",
    test_msi_capabilities_fit_the_interrupts="capability MSI offers 4 vectors, GET_IRQ_INFO says 33",
)
class TestTooManyVectors(Suite):
    class device(Registers):
        def irq_info(self, index: int) -> IrqInfo:
            return replace(super().irq_info(index), count=33) if index == Irq.MSI else super().irq_info(index)


@fails(
    test_every_byte_can_be_read_in_every_width="a read of 1 bytes of BAR0 at 0x3f raised IndexError",
)
class TestReadsBeyond(Suite):
    class device(Registers):
        def bar_read(self, bar: int, offset: int, size: int) -> int:
            return [*self.state[:61], None, None][offset] or 0  # a table that is too short


@fails(
    test_every_byte_can_be_read_in_every_width="a read of 8 bytes of BAR0 at 0x0 returned 4 bytes",
    test_configuration_space_can_be_read_at_once="assert b'",
)
class TestReadsShort(Suite):
    class device(Registers):
        def read(self, region: int, offset: int, count: int) -> bytes:
            return super().read(region, offset, count)[:4]


@fails(
    test_device_survives_random_writes="a write of .* to BAR0 at .* raised ValueError",
)
class TestBugInWrite(Suite):
    class device(Registers):
        def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
            self.state[offset] = value  # more than a byte holds


@fails(
    test_display_requests_are_answered="QUERY_GFX_PLANE was answered with None",
)
class TestNoAnswerAboutDisplay(Suite):
    class device(Registers):
        def query_gfx_plane(self, plane_type: int) -> Any:
            return None


# -- configuration space ---------------------------------------------------------------------------------------------------


class Defined(Registers):
    """Lays a register of configuration space out in another way; `defined`: offset, size, value, writable bits."""

    defined: tuple[int, int, int, int]

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        offset, size, value, writable = self.defined
        self.config.define(offset, size, value, writable=writable)


@fails(
    test_header_identifies_the_device="header type 0x1 is not that of a device",
)
class TestBridge(Suite):
    class device(Defined):
        defined = (0xE, 0x1, 0x1, 0x0)


@fails(
    test_read_only_fields_stay="device id went from 0x1 to 0x0",
    test_device_survives_random_writes="the device's ids changed",
)
class TestWritableIds(Suite):
    class device(Defined):
        defined = (0x2, 0x2, 0x1, 0xFFFF)


@fails(
    test_sizing_gives_powers_of_two="BAR0 answers sizing with 0x100, its region has 0x40 bytes",
)
class TestWrongSizing(Suite):
    class device(Defined):
        defined = (0x10, 0x4, 0x0, 0xFFFFFF00)


@fails(
    test_sizing_gives_powers_of_two="answers sizing with 0xfffffc0: its ones are not in one piece",
)
class TestHolesInSizing(Suite):
    class device(Defined):
        defined = (0x10, 0x4, 0x0, 0xFFFFFC0)


@fails(
    test_sizing_of_the_rom="the ROM register answers sizing with 0x800, region ROM has 0x0 bytes",
)
class TestRomWithoutRegion(Suite):
    class device(Defined):
        defined = (0x30, 0x4, 0x0, 0xFFFFF801)


@fails(
    test_interrupt_pin_fits="interrupt pin 1, but 0 interrupts at index INTX",
)
class TestPinWithoutInterrupt(Suite):
    class device(Defined):
        defined = (0x3D, 0x1, 0x1, 0x0)

        def __init__(self, name: str) -> None:
            super().__init__(name, interrupt_pin=0)


@fails(
    test_capability_list_ends="the capability list comes back to 0x40: it never ends",
)
class TestEndlessCapabilities(Suite):
    class device(Defined):
        defined = (0x41, 0x1, 0x40, 0x0)


@fails(
    test_mapped_regions_go_without_intx="a region can be mapped, and the device has INTx",
)
class TestMappedWithIntx(Suite):
    class device(Mapped):
        def irq_info(self, index: int) -> IrqInfo:
            return IrqInfo(IrqFlag.EVENTFD, 1) if index == Irq.INTX else super().irq_info(index)


# -- state -----------------------------------------------------------------------------------------------------------------


@fails(
    test_reset_restores_the_state_after_create="after RESET BAR0 at 0x3. reads .*, not 0x00000000",
    test_next_client_finds_a_new_device="the next client finds that BAR0 at 0x3. reads .*, not 0x00000000",
)
class TestResetsHalf(Suite):
    class device(Registers):
        def device_reset(self) -> None:
            self.state[:0x30] = bytes(0x30)


@fails(
    test_devices_share_no_state="writes to another device changed this one: BAR0 at 0x0 reads",
)
class TestSharesState(Suite):
    class device(Registers):
        shared = bytearray(64)

        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.state = self.shared

        def device_reset(self) -> None:
            self.state[0] = 0


@fails(
    test_opens_leave_nothing=r"left behind by 10 clients: descriptor \d+ \(anon_inode:\[eventfd\]\)",
)
class TestOpensLeak(Suite):
    class device(Registers):
        def device_attached(self) -> None:
            os.eventfd(0)


@fails(
    test_release_drops_what_the_client_gave=r"left behind by a client that had mapped memory: descriptor \d+ \(/memfd:guest",
)
class TestKeepsMemory(Suite):
    class device(Registers):
        def release(self) -> None:
            kept, self.dma._regions = self.dma._regions, []
            super().release()
            self.kept = kept


# -- interrupts ------------------------------------------------------------------------------------------------------------


@fails(
    test_interrupts_can_be_armed_and_tested=r"a test signal of MSI number 3 signalled \[0, 1, 2, 3\]",
)
class TestSignalsAll(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            test = request.count and request.flags == IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER
            count = self.irq_info(request.index).count
            super().set_irqs(replace(request, start=0, count=count) if test else request)


@fails(
    test_disabled_interrupts_are_not_signalled="a test signal of INTX, which is disabled, was not refused",
)
class TestCannotDisable(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.count:
                super().set_irqs(request)


@fails(
    test_one_kind_of_interrupt_at_a_time="arming MSI while INTX is armed was not refused",
)
class TestBothAtOnce(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.index == Irq.MSI and request.fds:
                self.interrupts.intx.trigger = None
            super().set_irqs(request)


@fails(
    test_absent_interrupts_are_refused="arming MSIX, which the device does not have, was not refused",
)
class TestTakesAbsent(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.index != Irq.MSIX:
                super().set_irqs(request)


@fails(
    test_absent_interrupts_are_refused="arming MSIX was refused, and a descriptor that came with it is still open",
)
class TestKeepsRefused(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.index == Irq.MSIX:
                raise MdevError(errno.EINVAL, "no MSI-X here")
            super().set_irqs(request)


@fails(
    test_eventfd_can_be_taken_back="INTX does not signal the eventfd it was given last",
)
class TestKeepsOldEventfd(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.fds and self.interrupts.active == request.index:
                for fd in request.fds:
                    os.close(fd) if fd >= 0 else None
                return
            super().set_irqs(request)


@fails(
    test_intx_can_be_masked="not now",
)
class TestCannotMask(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.flags & IrqSet.ACTION_UNMASK:
                raise MdevError(errno.EINVAL, "not now")
            super().set_irqs(request)


@fails(
    test_masking_what_cannot_be_masked_is_refused="ACTION_MASK of MSI was not refused",
)
class TestMasksAnything(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.flags & IrqSet.ACTION_TRIGGER:
                super().set_irqs(request)


@fails(
    test_device_can_ask_for_itself="request says that it asked the client, whose REQ is not armed",
)
class TestAlwaysAsks(Suite):
    class device(Registers):
        def request(self, count: int) -> bool:
            super().request(count)
            return True


@fails(
    test_error_and_request_take_an_eventfd=r"a test signal of ERR number 0 signalled \[\]",
)
class TestDeafError(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.index == Irq.ERR and not request.fds:
                return
            super().set_irqs(request)


@fails(
    test_reset_keeps_eventfds="INTX is not enabled|INTX is not armed any more after RESET|INTx is not enabled",
)
class TestResetDisarms(Suite):
    class device(Registers):
        def device_reset(self) -> None:
            super().device_reset()
            for trigger in self.interrupts.clear():
                trigger.close()


# -- DMA -------------------------------------------------------------------------------------------------------------------


@fails(
    test_memory_is_mapped_and_unmapped=r"left behind by memory that was unmapped: descriptor \d+ \(/memfd:guest",
)
class TestForgetsToClose(Suite):
    class device(Registers):
        def dma_unmap(self, iova: int, size: int) -> None:
            for region in self.dma._regions:
                if region.iova == iova:
                    region.fd = os.dup(region.fd)
                    os.dup(region.fd)
            super().dma_unmap(iova, size)


@fails(
    test_unmap_takes_exactly_one_map=r"unmapping 0x100000000\+0x1000 of the map .* was not refused",
)
class TestUnmapsParts(Suite):
    class device(Registers):
        def dma_unmap(self, iova: int, size: int) -> None:
            for region in self.dma._regions:
                if region.iova <= iova < region.iova + region.size:
                    super().dma_unmap(region.iova, region.size)
                    return
            super().dma_unmap(iova, size)


@fails(
    test_overlapping_maps_are_refused="a map was refused, and its descriptor is closed",
    test_impossible_maps_are_refused="a map was refused, and its descriptor is closed",
)
class TestClosesRefused(Suite):
    class device(Registers):
        def dma_map(self, region: Any) -> None:
            try:
                super().dma_map(region)
            except OSError:
                os.close(region.fd)
                raise


@fails(
    test_overlapping_maps_are_refused="mapping .* over .* was not refused",
)
class TestReplacesMaps(Suite):
    class device(Registers):
        def dma_map(self, region: Any) -> None:
            for other in list(self.dma._regions):
                if other.iova < region.iova + region.size and region.iova < other.iova + other.size:
                    self.dma.unmap(other.iova, other.size)
            super().dma_map(region)


@fails(
    test_number_of_maps_is_bounded="one of 1025 maps was not refused",
    test_number_of_descriptors_is_bounded="one of 257 maps, each with a descriptor, was not refused",
)
class TestMapsWithoutEnd(Suite):
    class device(Registers):
        def dma_map(self, region: Any) -> None:
            if len(self.dma._regions) >= 256:
                self.dma.unmap(self.dma._regions[-1].iova, self.dma._regions[-1].size)
            super().dma_map(region)


@fails(
    test_reset_keeps_maps="is not a mapped range",
)
class TestResetUnmaps(Suite):
    class device(Registers):
        def device_reset(self) -> None:
            super().device_reset()
            self.dma.unmap_all()


# -- mapped regions --------------------------------------------------------------------------------------------------------


class OtherMapping(Mapped):
    """Gives another mapping for BAR 0."""

    def other(self, mapping: Mapping) -> Mapping:
        return mapping

    def region_info(self, index: int) -> RegionInfo:
        info = super().region_info(index)
        return info if info.mapping is None else replace(info, mapping=self.other(info.mapping))


@fails(
    test_mapped_regions_are_sealed_memory_files="the file behind BAR0 lacks F_SEAL_SHRINK, F_SEAL_GROW",
    test_mapping_and_messages_reach_the_same_bytes="was written by message, the mapping has 0000000000000000",
)
class TestNotSealed(Suite):
    class device(OtherMapping):
        fd = -1

        def device_attached(self) -> None:
            self.fd = os.memfd_create("bar")
            os.ftruncate(self.fd, 4 * PAGE)

        def device_detached(self) -> None:
            os.close(self.fd)

        def other(self, mapping: Mapping) -> Mapping:
            return replace(mapping, fd=self.fd)


@fails(
    test_mapped_areas_are_pages_of_the_region=r"area 0x1000\+0x800 of BAR0 is not made of whole pages",
)
class TestHalfPages(Suite):
    class device(OtherMapping):
        def other(self, mapping: Mapping) -> Mapping:
            return replace(mapping, areas=(SparseArea(PAGE, PAGE // 2),))


# -- migration -------------------------------------------------------------------------------------------------------------


class Migrating(Registers):
    """Has something in front of its migration."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.migration = self.Front(self.migration)

    def device_reset(self) -> None:
        super().device_reset()
        if hasattr(self, "migration") and self.migration is not None:
            self.migration.real.reset()

    class Front:
        """Passes everything on."""

        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)


@fails(
    test_every_arc_is_the_kernels="going from STOP_COPY to PRE_COPY was not refused",
)
class TestAnyArc(Suite):
    class device(Migrating):
        class Front(Migrating.Front):
            def set_state(self, wanted: MigrationState) -> None:
                if self.real.state is MigrationState.STOP_COPY and wanted is MigrationState.PRE_COPY:
                    self.real.set_state(MigrationState.RUNNING)
                self.real.set_state(wanted)


@fails(
    test_stop_copy_carries_the_whole_state="the stream does not carry everything: after the load BAR0 at 0x3c reads 0x00000000",
    test_pre_copy_carries_the_whole_state="the stream does not carry everything: after the load BAR0 at 0x3c reads 0x00000000",
)
class TestForgetsRegister(Suite):
    class device(Registers):
        def save(self) -> bytes:
            return self.magic + bytes(self.state[:60]) + bytes(4)


@fails(
    test_stream_does_not_depend_on_the_pieces="read in pieces of 1 bytes the stream is another one",
)
class TestSavesTwice(Suite):
    """A stream whose length depends on the pieces it is read in."""

    class device(Migrating):
        class Front(Migrating.Front):
            def read(self, count: int) -> bytes:
                return self.real.read(max(count, 16))[:count]


@fails(
    test_size_is_told="assert 0 > 0",
)
class TestNoSize(Suite):
    class device(Migrating):
        class Front(Migrating.Front):
            def data_size(self) -> int:
                return 0


@fails(
    test_streams_are_closed_outside_their_states="reading migration data in RUNNING was not refused",
)
class TestReadsAnywhere(Suite):
    class device(Migrating):
        class Front(Migrating.Front):
            def read(self, count: int) -> bytes:
                return b"" if self.real.state is MigrationState.RUNNING else self.real.read(count)


@fails(
    test_broken_streams_are_refused_without_effect="a migration stream of random bytes was not refused",
)
class TestLoadsGarbage(Suite):
    class device(Registers):
        def load(self, data: bytes) -> None:
            self.state[:] = data[len(self.magic) :]


@fails(
    test_broken_streams_are_refused_without_effect="a migration stream of random bytes was refused, and yet BAR0 at 0x0 reads",
)
class TestLoadsThenChecks(Suite):
    class device(Registers):
        def load(self, data: bytes) -> None:
            self.state[:] = data[len(self.magic) :]
            super().load(data)


@fails(
    test_mutated_streams_do_no_harm="a migration stream whose byte 0 is .* made the plugin raise KeyError",
)
class TestBugInLoad(Suite):
    class device(Registers):
        def load(self, data: bytes) -> None:
            if data[0] != self.magic[0]:
                raise KeyError(data[0])
            super().load(data)
