"""SET_IRQS in all its forms, and who owns the eventfds (include/uapi/linux/vfio.h, vfio_pci_intrs.c)."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from mdevkit_vfio.ops import IrqRequest, VfioOps
from mdevkit_vfio.uapi import Irq, IrqFlag, IrqSet

from mdevkit_testkit.suites.base import refused
from mdevkit_testkit.suites.vfio import base
from mdevkit_testkit.suites.vfio.base import VfioBase, irq_count, needs

_MESSAGES: Final = (Irq.INTX, Irq.MSI, Irq.MSIX)
_SINGLE: Final = (Irq.ERR, Irq.REQ)

#: How long is waited for a signal that should not come, in seconds.
_SILENCE: Final = 0.02

#: As many vectors as a test arms.
_MOST_VECTORS: Final = 8


class Eventfds:
    """Eventfds of a client: gives duplicates away and sees which were signalled."""

    def __init__(self, count: int) -> None:
        self._fds: Final = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for fd in self._fds:
            os.close(fd)

    def duplicates(self) -> list[int]:
        """Return descriptors for the device to own."""
        return [os.dup(fd) for fd in self._fds]

    def signalled(self, expected: Sequence[int] = ()) -> list[int]:
        """Wait for the eventfds of `expected`, then return every one that was signalled, and clear them."""
        for position in expected:
            _wait_for(self._fds[position])
        time.sleep(_SILENCE)  # a signal that should not come is not announced
        found = []
        for position, fd in enumerate(self._fds):
            with suppress(BlockingIOError):
                os.eventfd_read(fd)
                found.append(position)
        return found


def _wait_for(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(base.PATIENCE * 1000)


def arm(ops: VfioOps, index: int, fds: Sequence[int], start: int = 0) -> None:
    """SET_IRQS TRIGGER with eventfds; the device owns them."""
    ops.set_irqs(IrqRequest(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, index, start, len(fds), fds=fds))


def disable(ops: VfioOps, index: int) -> None:
    """SET_IRQS TRIGGER with no data and count 0."""
    ops.set_irqs(IrqRequest(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, index, 0, 0))


def send(ops: VfioOps, index: int, action: IrqSet, start: int = 0, count: int = 1) -> None:
    """SET_IRQS with no data."""
    ops.set_irqs(IrqRequest(IrqSet.DATA_NONE | action, index, start, count))


def send_bools(ops: VfioOps, index: int, action: IrqSet, bools: Sequence[bool]) -> None:
    """SET_IRQS with bools, from the first interrupt on."""
    ops.set_irqs(IrqRequest(IrqSet.DATA_BOOL | action, index, 0, len(bools), bools=bools))


class Interrupts(VfioBase):
    """Arming, testing, masking and giving up interrupts."""

    def test_interrupts_can_be_armed_and_tested(self, ops: VfioOps) -> None:
        """Checks that each index takes an eventfd for every interrupt, and signals just those a client asks it to."""
        for index in _MESSAGES:
            count = min(irq_count(ops, index), _MOST_VECTORS)
            if count:
                with Eventfds(count) as eventfds:
                    arm(ops, index, eventfds.duplicates())
                    eventfds.signalled()
                    self._check_test_signals(ops, index, eventfds, count)
                    disable(ops, index)

    def test_disabled_interrupts_are_not_signalled(self, ops: VfioOps) -> None:
        """Checks that an index which was switched off refuses test signals with EINVAL and lets go of its eventfds."""
        for index in _MESSAGES:
            if irq_count(ops, index):
                with Eventfds(1) as eventfds:
                    arm(ops, index, eventfds.duplicates())
                    disable(ops, index)
                    eventfds.signalled()
                    with refused(f"a test signal of {index.name}, which is disabled,", errno.EINVAL):
                        send(ops, index, IrqSet.ACTION_TRIGGER)
                    assert not eventfds.signalled(), f"{index.name} was signalled after it had been disabled"

    def test_one_kind_of_interrupt_at_a_time(self, ops: VfioOps) -> None:
        """Checks that of INTx, MSI and MSI-X a second one is refused with EINVAL while one is armed."""
        present = [index for index in _MESSAGES if irq_count(ops, index)]
        for first in present:
            for second in present:
                if first is not second:
                    with Eventfds(1) as eventfds:
                        arm(ops, first, eventfds.duplicates())
                        fds = eventfds.duplicates()
                        with refused(f"arming {second.name} while {first.name} is armed", errno.EINVAL):
                            arm(ops, second, fds)
                        _check_closed(fds, f"arming {second.name} was refused")
                        disable(ops, first)

    def test_absent_interrupts_are_refused(self, ops: VfioOps) -> None:
        """Checks that arming an index without interrupts is refused with EINVAL or ENOTTY, and the descriptors are closed."""
        for index in range(ops.info().num_irqs):
            if not irq_count(ops, index):
                with Eventfds(1) as eventfds:
                    fds = eventfds.duplicates()
                    with refused(f"arming {Irq(index).name}, which the device does not have,", errno.EINVAL, errno.ENOTTY):
                        arm(ops, index, fds)
                    _check_closed(fds, f"arming {Irq(index).name} was refused")

    def test_eventfd_can_be_taken_back(self, ops: VfioOps) -> None:
        """Checks that the descriptor -1 takes an interrupt's eventfd away, and a new one replaces the old."""
        for index in _MESSAGES:
            if irq_count(ops, index):
                with Eventfds(1) as old, Eventfds(1) as new:
                    arm(ops, index, old.duplicates())
                    arm(ops, index, new.duplicates())
                    old.signalled()
                    send(ops, index, IrqSet.ACTION_TRIGGER)
                    assert new.signalled([0]) == [0], f"{index.name} does not signal the eventfd it was given last"
                    assert not old.signalled(), f"{index.name} still signals the eventfd that was replaced"
                    arm(ops, index, [-1])
                    with suppress(OSError):
                        send(ops, index, IrqSet.ACTION_TRIGGER)
                    assert not new.signalled(), f"{index.name} signals the eventfd that was taken back"
                    disable(ops, index)

    @needs("intx")
    def test_intx_can_be_masked(self, ops: VfioOps) -> None:
        """Checks that an armed INTx takes MASK and UNMASK, by no data and by bools, if it says that it is maskable."""
        assert ops.irq_info(Irq.INTX).flags & IrqFlag.AUTOMASKED, "INTx is level-triggered: it has to be AUTOMASKED"
        with Eventfds(1) as eventfds:
            arm(ops, Irq.INTX, eventfds.duplicates())
            if ops.irq_info(Irq.INTX).flags & IrqFlag.MASKABLE:
                for action in (IrqSet.ACTION_MASK, IrqSet.ACTION_UNMASK):
                    send(ops, Irq.INTX, action)
                    send_bools(ops, Irq.INTX, action, [True])
                    send_bools(ops, Irq.INTX, action, [False])
            disable(ops, Irq.INTX)

    def test_masking_what_cannot_be_masked_is_refused(self, ops: VfioOps) -> None:
        """Checks that an index which is not maskable refuses MASK and UNMASK with EINVAL or ENOTTY."""
        for index in range(ops.info().num_irqs):
            if irq_count(ops, index) and not ops.irq_info(index).flags & IrqFlag.MASKABLE:
                for action in (IrqSet.ACTION_MASK, IrqSet.ACTION_UNMASK):
                    with refused(f"{action.name} of {Irq(index).name}", errno.EINVAL, errno.ENOTTY):
                        send(ops, index, action)

    def test_device_can_ask_for_itself(self, ops: VfioOps) -> None:
        """Checks that `request` signals the REQ interrupt where it is armed, and says whether it was."""
        assert ops.request(0) is False, "request says that it asked the client, whose REQ is not armed"
        if irq_count(ops, Irq.REQ):
            with Eventfds(1) as eventfds:
                arm(ops, Irq.REQ, eventfds.duplicates())
                assert ops.request(0) is True, "request says that it did not ask the client, whose REQ is armed"
                assert eventfds.signalled([0]) == [0], "request did not signal REQ"
                disable(ops, Irq.REQ)

    def test_error_and_request_take_an_eventfd(self, ops: VfioOps) -> None:
        """Checks that ERR and REQ, where they exist, can be armed beside another index, tested and given up."""
        for index in _SINGLE:
            if irq_count(ops, index):
                with Eventfds(1) as eventfds:
                    arm(ops, index, eventfds.duplicates())
                    self._check_test_signals(ops, index, eventfds, 1)
                    disable(ops, index)

    @needs("reset")
    def test_reset_keeps_eventfds(self, ops: VfioOps) -> None:
        """Checks that RESET leaves interrupts armed."""
        for index in _MESSAGES:
            if irq_count(ops, index):
                with Eventfds(1) as eventfds:
                    arm(ops, index, eventfds.duplicates())
                    ops.reset()
                    eventfds.signalled()
                    send(ops, index, IrqSet.ACTION_TRIGGER)
                    assert eventfds.signalled([0]) == [0], f"{index.name} is not armed any more after RESET"
                    disable(ops, index)

    @staticmethod
    def _check_test_signals(ops: VfioOps, index: int, eventfds: Eventfds, count: int) -> None:
        name, last = Irq(index).name, count - 1
        send(ops, index, IrqSet.ACTION_TRIGGER, start=last)
        found = eventfds.signalled([last])
        assert found == [last], f"a test signal of {name} number {last} signalled {found}"
        pattern = [position % 2 == 0 for position in range(count)]
        wanted = [position for position, chosen in enumerate(pattern) if chosen]
        send_bools(ops, index, IrqSet.ACTION_TRIGGER, pattern)
        found = eventfds.signalled(wanted)
        assert found == wanted, f"test signals of {name} numbers {wanted} signalled {found}"


def _check_closed(fds: Sequence[int], when: str) -> None:
    for fd in fds:
        with suppress(OSError):
            os.fstat(fd)
            raise AssertionError(f"{when}, and a descriptor that came with it is still open: the device owns it and closes it")
