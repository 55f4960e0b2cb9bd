"""The card as a PCI function: one or two ports, each in an I/O BAR of its own, and one interrupt pin.

`MttyDevice` has 16550A ports that lead somewhere; `SampleDevice` is ``compat=linux``, the Linux sample to the byte. Register
accesses come on the thread of the client's connection, far ends on that of their poller; `PciDevice.lock` keeps them apart.
Far ends are the device's, from create to remove: no client, reset or migration closes them.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from mmap import mmap
from typing import Any, ClassVar, Final, Literal

from mdevkit.errors import MdevError
from mdevkit.sockets import Listen, listen_at
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.ops import DeviceInfo, IrqInfo, RegionInfo
from mdevkit_vfio.pci import Bar, PciDevice, PciIds
from mdevkit_vfio.pci.access import widths
from mdevkit_vfio.pci.regs import (
    BASE_ADDRESS_0,
    CAPABILITY_LIST,
    COMMAND,
    HEADER_SIZE,
    INTERRUPT_LINE,
    STATUS,
    Command,
    Status,
)
from mdevkit_vfio.uapi import PCI_NUM_IRQS, PCI_NUM_REGIONS, Device, Irq, MigrationFlag, RegionFlag

from mdevkit_mtty import regs
from mdevkit_mtty.attributes import LINUX, LOOPBACK, NONE
from mdevkit_mtty.farend import FarEnds, Line
from mdevkit_mtty.regs import Counters, PortState, SamplePort
from mdevkit_mtty.sample import SampleUart
from mdevkit_mtty.state import OWN, SAMPLE, CardState
from mdevkit_mtty.uart import Uart

IDS: Final = PciIds(
    vendor=regs.VENDOR_ID,
    device=regs.DEVICE_ID,
    subsystem_vendor=regs.VENDOR_ID,
    subsystem_device=regs.DEVICE_ID,
    class_code=regs.CLASS_CODE,
    revision=regs.REVISION,
)
MIGRATION: Final = MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY

#: What a guest may change in the command register of a function with I/O ports and a pin (PCI 3.0, 6.2.2).
_COMMAND_BITS: Final = Command.IO | Command.MASTER | Command.PARITY | Command.SERR | Command.INTX_DISABLE
_READ_WRITE: Final = RegionFlag.READ | RegionFlag.WRITE


class SerialDevice(PciDevice, ABC):
    """What both kinds of card share. `state`, for 1 or 2 ports, holds everything a guest can read back from a port."""

    #: Value of the attribute ``compat``.
    compat: ClassVar[str]

    def __init__(
        self, state: CardState[Any], *, name: str, widest: Literal[1, 4], msi_vectors: int = 0, config_size: int = 256
    ) -> None:
        bars = {port: Bar(regs.BAR_SIZE, "io", widest=widest) for port in range(len(state.ports))}
        super().__init__(IDS, bars, interrupt_pin=1, msi_vectors=msi_vectors, config_size=config_size, name=name)
        self._card: Final = state
        self._define_sample_bytes()
        self._migration: Final = Migration(
            MIGRATION,
            save=state.save,
            load=state.load,
            header=state.save_header,
            check_header=state.check_header,
            size=lambda: state.stream_size,
            stop=self._stop,
            resume=self._resume,
            lock=self.lock,
        )
        self.migration = self._migration

    def _define_sample_bytes(self) -> None:
        """Lay out what differs from the kit's header. As in the sample, I/O decoding is on from the start, which no guest minds."""
        self.config.define(COMMAND, 2, Command.IO, writable=_COMMAND_BITS)
        self.config.define(STATUS, 2, Status.DEVSEL_MEDIUM, write_1_clears=Status.ERRORS)
        for offset, data in regs.VENDOR_CONFIG:
            self.config.define(offset, len(data), int.from_bytes(data, "little"))

    def counters(self, port: int) -> Counters:
        """Return what a port has done; any thread."""
        return self._card.counters[port]

    @abstractmethod
    def far_end(self, port: int) -> str:
        """Return the far end of a port as text; any thread."""

    @abstractmethod
    def set_far_end(self, port: int, spec: str) -> None:
        """Change the far end of a port; any thread, without the lock. Errors as `FarEnds.set`."""

    @abstractmethod
    def far_end_path(self, port: int) -> str:
        """Return what a person opens to talk to a port, empty for loopback; any thread."""

    def close(self) -> None:
        """Give everything back; the device is not used afterwards. Without the lock."""

    def device_checkpoint(self) -> bytes:
        """See `PciDevice.device_checkpoint`: the card's memory, byte counts and all."""
        return bytes(self._card.memory)

    def device_restore(self, state: bytes) -> None:
        """See `PciDevice.device_restore`."""
        self._card.restore(state)

    def _stop(self) -> None:
        """Migration wants the device to stand still."""

    def _resume(self) -> None:
        """Migration lets it go on."""


class MttyDevice(SerialDevice):
    """A card that works: `ports` 16550As, whose interrupts share the pin. Their state is in `memory`, if that is given.

    `listen` makes the sockets of far ends, see `mdevkit.device.Mdev.listen`.
    """

    compat = NONE

    def __init__(
        self, ports: int, *, name: str = "mtty", memory: bytearray | mmap | None = None, listen: Listen = listen_at
    ) -> None:
        self.state: Final[CardState[PortState]] = CardState(OWN, ports, memory)
        super().__init__(self.state, name=name, widest=1)
        self._stopped = False
        self._uarts: Final = [Uart(*pair) for pair in zip(self.state.ports, self.state.counters, strict=True)]
        self._far_ends: Final = FarEnds(ports, name, self.lock, self._plug, self._pump, listen)
        self.device_reset()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`: every register is a byte."""
        del size
        value = self._uarts[bar].read(offset)
        self._drive_pin()
        return value

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`."""
        del size
        self._uarts[bar].write(offset, value)
        self._drive_pin()

    def device_reset(self) -> None:
        """Power the ports on; what waits at the far ends stays there."""
        for uart in self._uarts:
            uart.reset()
        self._drive_pin()

    def far_end(self, port: int) -> str:
        """See `SerialDevice.far_end`."""
        return self._far_ends.spec(port)

    def set_far_end(self, port: int, spec: str) -> None:
        """See `SerialDevice.set_far_end`."""
        self._far_ends.set(port, spec)

    def far_end_path(self, port: int) -> str:
        """See `SerialDevice.far_end_path`."""
        return self._far_ends.path(port)

    def close(self) -> None:
        """See `SerialDevice.close`."""
        self._far_ends.close()

    def _drive_pin(self) -> None:
        """Follow the ports. Without a change there is nothing to tell the kit, which asks again after each interrupt."""
        level = any(uart.interrupt for uart in self._uarts)
        if level != self.interrupts.intx.level:
            self.set_intx(level)

    def _plug(self, port: int, line: Line | None) -> None:
        self._uarts[port].wire = line
        self._pump()

    def _pump(self) -> None:
        """Let every port send and receive, unless migration has stopped them; what happened meanwhile waits for `_resume`."""
        if not self._stopped:
            for uart in self._uarts:
                uart.pump()
            self._drive_pin()

    def _stop(self) -> None:
        self._stopped = True

    def _resume(self) -> None:
        self._stopped = False
        self._pump()


class SampleDevice(SerialDevice):
    """The Linux sample: its ports, its configuration space of 255 bytes, MSI without a capability, always looped back.

    What one client has left behind the next does not see, although the sample shows it: that is this framework's rule.
    """

    compat = LINUX

    def __init__(self, ports: int, *, name: str = "mtty", memory: bytearray | mmap | None = None) -> None:
        self.state: Final[CardState[SamplePort]] = CardState(SAMPLE, ports, memory)
        super().__init__(self.state, name=name, widest=4, msi_vectors=1, config_size=regs.SAMPLE_CONFIG_SIZE)
        pairs = zip(self.state.ports, self.state.counters, strict=True)
        self._uarts: Final = [SampleUart(port, counters, self._interrupt) for port, counters in pairs]
        self._hide_msi()
        self.device_reset()

    def _hide_msi(self) -> None:
        """Take the capability out again that came with the vector: the sample has an MSI that nobody can find."""
        self.config.define(CAPABILITY_LIST, 1)
        self.config.define(HEADER_SIZE, self.config.size - HEADER_SIZE)
        self._define_sample_bytes()

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        """See `PciDevice.bar_read`: a wider access reads one register, too."""
        del size
        return self._uarts[bar].read(offset)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciDevice.bar_write`: a wider access writes one register, too."""
        del size
        self._uarts[bar].write(offset, value & 0xFF)

    def config_write_hook(self, offset: int, data: bytes) -> bool:
        """Know two base address registers and the interrupt line, at their first bytes; the rest cannot be written."""
        for start, width in widths(offset, len(data), 4):
            value = int.from_bytes(data[start - offset :][:width], "little")
            if start == INTERRUPT_LINE:
                self.config.put(start, 1, value & 0xFF)
            elif start in range(BASE_ADDRESS_0, BASE_ADDRESS_0 + 4 * len(self._uarts), 4):
                self._write_bar(start, value)
        return True

    def _write_bar(self, offset: int, value: int) -> None:
        """All ones ask for the size; anything else is stored, shorter accesses with zeros in the other bytes."""
        mask = -regs.BAR_SIZE if value == 0xFFFFFFFF else -1
        self.config.put(offset, 4, value & mask & 0xFFFFFFFF | self.config.get(offset, 4) & 0x3)

    def device_reset(self) -> None:
        """Power the ports on."""
        for uart in self._uarts:
            uart.reset()

    def reset(self) -> None:
        """RESET ends a migration, and touches neither ports nor configuration space."""
        self._migration.reset()

    def info(self) -> DeviceInfo:
        """GET_INFO: RESET works, but is not offered."""
        return DeviceInfo(Device.PCI, PCI_NUM_REGIONS, PCI_NUM_IRQS)

    def region_info(self, index: int) -> RegionInfo:
        """GET_REGION_INFO: what does not exist can be read and written too, all 0 bytes of it."""
        return RegionInfo(_READ_WRITE, super().region_info(index).size)

    def irq_info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO: EINVAL for all but INTx and MSI."""
        if index not in {Irq.INTX, Irq.MSI}:
            raise MdevError(errno.EINVAL, f"the device has no interrupt index {index}", self)
        return super().irq_info(index)

    def far_end(self, port: int) -> str:
        """See `SerialDevice.far_end`."""
        del port
        return LOOPBACK

    def set_far_end(self, port: int, spec: str) -> None:
        """Refuse anything but loopback: EINVAL."""
        if spec != LOOPBACK:
            raise MdevError(errno.EINVAL, f"port {port} of a device with compat={LINUX} is always {LOOPBACK}, not {spec}", self)

    def far_end_path(self, port: int) -> str:
        """See `SerialDevice.far_end_path`."""
        del port
        return ""

    def _interrupt(self) -> None:
        """Signal once: MSI if it is armed, else the pin, unless it is masked; then the event is lost."""
        if self.interrupts.msi.triggers[0] is not None:
            self.trigger_msi()
        else:
            self.set_intx(True)
            self.set_intx(False)
