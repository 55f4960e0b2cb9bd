"""SET_IRQS: arming, masking and firing interrupts."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mdevkit_vfio.proto.header import Buffer, Command, at_least, check_argsz, invalid
from mdevkit_vfio.uapi import IRQ_SET_ACTION_MASK, IRQ_SET_DATA_MASK, IrqSet

_IRQ_SET = struct.Struct("=IIIII")


@dataclass(frozen=True, slots=True)
class SetIrqs:
    """SET_IRQS; `bools` holds one value per interrupt for DATA_BOOL, descriptors travel beside the payload."""

    flags: int
    index: int
    start: int
    count: int
    bools: Sequence[bool] = ()

    def pack(self) -> bytes:
        """Return the payload."""
        data = bytes(self.bools)
        return _IRQ_SET.pack(_IRQ_SET.size + len(data), self.flags, self.index, self.start, self.count) + data

    @classmethod
    def parse(cls, payload: Buffer, fds: int, counts: Sequence[int]) -> SetIrqs:
        """Read the payload that came with `fds` descriptors for a device with `counts` interrupts per index.

        The rules are those of vfio_set_irqs_validate_and_prepare() in drivers/vfio/vfio_main.c, with the descriptors
        counted instead of an array of them; a count of 0 means "the whole index off" and nothing else.
        """
        at_least(Command.DEVICE_SET_IRQS, payload, _IRQ_SET.size)
        argsz, *rest = _IRQ_SET.unpack_from(payload)
        check_argsz(Command.DEVICE_SET_IRQS, argsz, _IRQ_SET.size)
        request = cls(*rest)
        request._check_flags()
        request._check_range(counts)
        request._check_data(len(payload) - _IRQ_SET.size, argsz - _IRQ_SET.size, fds)
        if request.flags & IrqSet.DATA_BOOL:
            request = replace(request, bools=tuple(map(bool, payload[_IRQ_SET.size :])))
        return request

    def _check_flags(self) -> None:
        data = self.flags & IRQ_SET_DATA_MASK
        action = self.flags & IRQ_SET_ACTION_MASK
        if data.bit_count() != 1 or action.bit_count() != 1 or self.flags != data | action:
            raise invalid(Command.DEVICE_SET_IRQS, f"flags {self.flags:#x} are not one data type and one action")

    def _check_range(self, counts: Sequence[int]) -> None:
        if self.index >= len(counts):
            raise invalid(Command.DEVICE_SET_IRQS, f"index {self.index} does not exist")
        if self.start >= counts[self.index] or self.start + self.count > counts[self.index]:
            raise invalid(
                Command.DEVICE_SET_IRQS,
                f"{self.count} from {self.start} exceed the {counts[self.index]} interrupts of index {self.index}",
            )
        if self.count == 0 and (self.start or self.flags != IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER):
            raise invalid(Command.DEVICE_SET_IRQS, "a count of 0 goes with start 0, no data and TRIGGER")

    def _check_data(self, data: int, claimed: int, fds: int) -> None:
        if self.flags & IrqSet.DATA_BOOL and not (data == self.count and claimed >= self.count):
            raise invalid(Command.DEVICE_SET_IRQS, f"{data} bytes of data for {self.count} interrupts")
        if fds and (not self.flags & IrqSet.DATA_EVENTFD or fds != self.count):
            raise invalid(Command.DEVICE_SET_IRQS, f"{fds} descriptors do not fit this request")
