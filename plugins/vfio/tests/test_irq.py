"""The interrupts of one device: SET_IRQS in all its forms on real eventfds, and what the device raises."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio.irq import Interrupts, Trigger
from mdevkit_vfio.ops import IrqRequest
from mdevkit_vfio.uapi import Irq, IrqFlag, IrqSet

FULL = 0xFFFF_FFFF_FFFF_FFFE
#: The number of write(2).
WRITE = {"x86_64": 1, "aarch64": 64}[os.uname().machine]
NONE, BOOL, EVENTFD = IrqSet.DATA_NONE, IrqSet.DATA_BOOL, IrqSet.DATA_EVENTFD
MASK, UNMASK, TRIGGER = IrqSet.ACTION_MASK, IrqSet.ACTION_UNMASK, IrqSet.ACTION_TRIGGER


def eventfd_id(fd: int) -> str:
    """The kernel's name for the eventfd behind a descriptor, "" if there is none: numbers are used again, ids are not."""
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except FileNotFoundError:
        return ""
    return next((line for line in lines if line.startswith("eventfd-id")), "")


class Line:
    """The client's end of an eventfd; `given` is what the device gets and owns."""

    def __init__(self, flags: int = os.EFD_NONBLOCK) -> None:
        self.fd = os.eventfd(0, flags)
        self.given = os.dup(self.fd)

    def count(self) -> int:
        """Signals since the last look."""
        if not select.select([self.fd], [], [], 0)[0]:
            return 0
        return os.eventfd_read(self.fd)

    def held(self) -> bool:
        """Whether the device still has its descriptor."""
        return eventfd_id(self.given) == eventfd_id(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class Rig:
    """Interrupts of a device with everything, and a shorthand for each side."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.irqs = Interrupts(Trigger.signal, pins=1, msi=4, msix=8)

    def line(self) -> Line:
        self.lines.append(Line())
        return self.lines[-1]

    def set(
        self, flags: IrqSet, index: int, start: int = 0, count: int = 1, *, bools: Sequence[bool] = (), fds: Sequence[int] = ()
    ) -> None:
        for trigger in self.irqs.set_irqs(IrqRequest(flags, index, start, count, bools, fds)):
            trigger.close()

    def arm(self, index: int, vector: int = 0) -> Line:
        line = self.line()
        self.set(EVENTFD | TRIGGER, index, vector, fds=[line.given])
        return line

    def disable(self, index: int) -> None:
        self.set(NONE | TRIGGER, index, count=0)

    def close(self) -> None:
        for trigger in self.irqs.clear():
            trigger.close()
        for line in self.lines:
            assert not line.held(), "the device kept a descriptor"
            line.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


# -- Trigger --------------------------------------------------------------------------------------------------------


def test_a_signal_adds_one() -> None:
    line = Line()
    trigger = Trigger(line.given)
    trigger.signal()
    trigger.signal()
    assert line.count() == 2
    trigger.close()
    line.close()


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_a_full_counter_is_left_alone(flags: int) -> None:
    line = Line(flags)
    trigger = Trigger(line.given)
    os.eventfd_write(line.fd, FULL)
    trigger.signal()
    assert line.count() == FULL
    trigger.close()
    line.close()


@pytest.mark.parametrize(("flags", "blocking"), [(0, True), (os.EFD_NONBLOCK, False)])
def test_blocking_mode_is_noticed(flags: int, blocking: bool) -> None:
    line = Line(flags)
    trigger = Trigger(line.given)
    assert trigger.blocking is blocking
    trigger.close()
    line.close()


def test_a_closed_trigger_does_nothing_and_closes_once() -> None:
    line = Line()
    trigger = Trigger(line.given)
    trigger.close()
    assert not line.held()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    assert other == line.given, "the number is in use again, by somebody else"
    trigger.close()
    trigger.signal()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)
    line.close()


class StuckTrigger(Trigger):
    """A trigger whose client fills the counter right after the check, which is what blocks the write."""

    client: int

    def _enter(self) -> bool:
        entered = super()._enter()
        os.eventfd_write(self.client, FULL)
        return entered


def stuck_writer(line: Line) -> tuple[StuckTrigger, threading.Thread]:
    trigger = StuckTrigger(line.given)
    trigger.client = line.fd
    thread = threading.Thread(target=trigger.signal, daemon=True)
    thread.start()
    wait_until_blocked(thread)
    return trigger, thread


def wait_until_blocked(thread: threading.Thread) -> None:
    """Wait for the thread to sleep in write(2), as /proc tells."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith(f"{WRITE} "):
            return
        time.sleep(0.001)  # the thread needs the processor
    pytest.fail("the writer did not block")


@pytest.mark.parametrize("flags", [0, os.EFD_SEMAPHORE])
def test_close_frees_a_writer_the_client_has_blocked(flags: int) -> None:
    line = Line(flags)
    trigger, thread = stuck_writer(line)
    started = time.monotonic()
    trigger.close()
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - started < 1
    assert not line.held()
    line.close()


def test_close_gives_up_on_a_client_that_goes_on_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdevkit_vfio.irq.DRAIN_SECONDS", 0.05)
    line = Line()
    trigger = Trigger(line.given)
    assert trigger._enter(), "a writer that never comes back"
    started = time.monotonic()
    trigger.close()
    assert 0.05 <= time.monotonic() - started < 1
    assert line.held(), "the writer still uses it"
    trigger._leave()
    assert not line.held()
    line.close()


# -- GET_IRQ_INFO ---------------------------------------------------------------------------------------------------


def test_info_says_what_each_index_can_do(rig: Rig) -> None:
    info = [rig.irqs.info(index) for index in range(5)]
    assert [i.count for i in info] == [1, 4, 8, 1, 1]
    fixed = IrqFlag.EVENTFD | IrqFlag.NORESIZE
    assert [i.flags for i in info] == [
        IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED,
        fixed,
        IrqFlag.EVENTFD,
        fixed,
        fixed,
    ]


def test_a_device_without_interrupts_has_error_and_request_only() -> None:
    irqs = Interrupts(Trigger.signal)
    assert [irqs.info(index).count for index in range(5)] == [0, 0, 0, 1, 1]
    with pytest.raises(MdevError, match="the device has no interrupt index 5"):
        irqs.info(5)


# -- INTx -----------------------------------------------------------------------------------------------------------


def test_the_pin_signals_once_and_again_after_unmask_while_high(rig: Rig) -> None:
    line = rig.arm(Irq.INTX)
    rig.irqs.intx.set_level(True)
    rig.irqs.intx.set_level(True)
    assert line.count() == 1
    rig.set(NONE | UNMASK, Irq.INTX)
    assert line.count() == 1, "still high: the interrupt is not lost"
    rig.irqs.intx.set_level(False)
    rig.set(NONE | UNMASK, Irq.INTX)
    assert line.count() == 0
    rig.irqs.intx.set_level(True)
    assert line.count() == 1


def test_a_level_that_comes_back_while_masked_is_not_lost(rig: Rig) -> None:
    line = rig.arm(Irq.INTX)
    for level in (True, False, True):
        rig.irqs.intx.set_level(level)
    assert line.count() == 1
    rig.set(NONE | UNMASK, Irq.INTX)
    assert line.count() == 1


def test_mask_holds_the_pin_back(rig: Rig) -> None:
    line = rig.arm(Irq.INTX)
    rig.set(NONE | MASK, Irq.INTX)
    rig.irqs.intx.set_level(True)
    assert line.count() == 0
    rig.set(BOOL | UNMASK, Irq.INTX, bools=[False])
    assert line.count() == 0
    rig.set(BOOL | UNMASK, Irq.INTX, bools=[True])
    assert line.count() == 1


def test_arming_with_the_pin_high_signals(rig: Rig) -> None:
    rig.irqs.intx.set_level(True)
    first = rig.arm(Irq.INTX)
    second = rig.arm(Irq.INTX)
    assert (first.count(), second.count()) == (1, 1), "a new eventfd starts unmasked"
    assert not first.held()


def test_interrupt_disable_holds_the_pin_back(rig: Rig) -> None:
    line = rig.arm(Irq.INTX)
    rig.irqs.intx.set_disabled(True)
    rig.irqs.intx.set_level(True)
    rig.set(NONE | TRIGGER, Irq.INTX)
    assert line.count() == 0
    rig.irqs.intx.set_disabled(False)
    assert line.count() == 1


def test_the_client_may_test_the_pin(rig: Rig) -> None:
    line = rig.arm(Irq.INTX)
    rig.set(NONE | TRIGGER, Irq.INTX)
    rig.set(BOOL | TRIGGER, Irq.INTX, bools=[False])
    rig.set(BOOL | TRIGGER, Irq.INTX, bools=[True])
    assert line.count() == 2


@pytest.mark.parametrize("off", ["disable", "minus one"])
def test_switching_intx_off(rig: Rig, off: str) -> None:
    line = rig.arm(Irq.INTX)
    if off == "disable":
        rig.disable(Irq.INTX)
    else:
        rig.set(EVENTFD | TRIGGER, Irq.INTX, fds=[-1])
    rig.irqs.intx.set_level(True)
    assert line.count() == 0
    assert not line.held()
    assert rig.irqs.active is None


# -- MSI and MSI-X --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [Irq.MSI, Irq.MSIX])
def test_each_vector_has_its_eventfd(rig: Rig, index: Irq) -> None:
    lines = [rig.line() for _ in range(4)]
    rig.set(EVENTFD | TRIGGER, index, 0, 4, fds=[line.given for line in lines])
    rig.irqs.fire(2)
    rig.irqs.fire(2)
    rig.irqs.fire(0)
    assert [line.count() for line in lines] == [1, 0, 2, 0]
    rig.set(NONE | TRIGGER, index, 1, 2)
    rig.set(BOOL | TRIGGER, index, 2, 2, bools=[False, True])
    assert [line.count() for line in lines] == [0, 1, 1, 1]


def test_a_vector_without_an_eventfd_stays_pending_until_it_gets_one(rig: Rig) -> None:
    rig.arm(Irq.MSIX, 0)
    rig.irqs.fire(5)
    rig.irqs.fire(5)
    assert rig.irqs.msix.pending == 1 << 5
    assert rig.arm(Irq.MSIX, 5).count() == 1
    assert rig.irqs.msix.pending == 0


def test_messages_are_lost_while_they_are_off(rig: Rig) -> None:
    rig.irqs.fire(1)
    assert rig.arm(Irq.MSIX, 1).count() == 0


def test_messages_wait_while_the_client_re_arms(rig: Rig) -> None:
    """QEMU disables and enables again to get more vectors; the guest's enable bit stays set meanwhile."""
    rig.arm(Irq.MSI, 0)
    rig.irqs.msi.set_control(enabled=True, function_masked=False)
    rig.disable(Irq.MSI)
    rig.irqs.fire(1)
    lines = [rig.line(), rig.line()]
    rig.set(EVENTFD | TRIGGER, Irq.MSI, 0, 2, fds=[line.given for line in lines])
    assert [line.count() for line in lines] == [0, 1]
    rig.disable(Irq.MSI)
    rig.irqs.fire(0)
    rig.irqs.msi.set_control(enabled=False, function_masked=False)
    assert rig.arm(Irq.MSI).count() == 0, "the guest switched MSI off in between"


def test_masked_vectors_stay_pending(rig: Rig) -> None:
    line = rig.arm(Irq.MSIX, 3)
    rig.irqs.msix.set_masked(1 << 3)
    rig.irqs.fire(3)
    rig.irqs.msix.set_masked(1 << 2)
    assert line.count() == 1
    rig.irqs.msix.set_control(enabled=True, function_masked=True)
    rig.irqs.fire(3)
    assert (line.count(), rig.irqs.msix.pending) == (0, 1 << 3)
    rig.irqs.msix.set_control(enabled=True, function_masked=False)
    assert (line.count(), rig.irqs.msix.pending) == (1, 0)


def test_msi_cannot_grow_while_enabled_but_msix_can(rig: Rig) -> None:
    lines = [rig.line() for _ in range(2)]
    rig.set(EVENTFD | TRIGGER, Irq.MSI, 0, 2, fds=[line.given for line in lines])
    with pytest.raises(MdevError, match="MSI is enabled with 2 vectors and cannot grow"):
        rig.arm(Irq.MSI, 2)
    rig.arm(Irq.MSI, 1)
    rig.disable(Irq.MSI)
    rig.arm(Irq.MSI, 3)
    rig.disable(Irq.MSI)
    rig.arm(Irq.MSIX, 0)
    rig.arm(Irq.MSIX, 7)


def test_one_vector_may_be_taken_away(rig: Rig) -> None:
    line = rig.arm(Irq.MSIX, 0)
    rig.set(EVENTFD | TRIGGER, Irq.MSIX, 0, fds=[-1])
    assert not line.held()
    assert rig.irqs.active is Irq.MSIX


def test_a_vector_the_device_lacks_is_a_bug_of_the_vendor(rig: Rig) -> None:
    with pytest.raises(ValueError, match="vector 8 is not one of the device's 8 vectors"):
        rig.irqs.fire(8)
    with pytest.raises(ValueError, match="vector -1"):
        rig.irqs.fire(-1)


def test_only_one_index_at_a_time(rig: Rig) -> None:
    """As QEMU switches: INTx off, MSI on, MSI off, INTx on; the level is still there at the end."""
    line = rig.arm(Irq.INTX)
    rig.irqs.intx.set_level(True)
    assert line.count() == 1
    with pytest.raises(MdevError, match="another interrupt index is enabled"):
        rig.arm(Irq.MSI)
    rig.disable(Irq.INTX)
    rig.arm(Irq.MSI)
    for index in (Irq.INTX, Irq.MSIX):
        with pytest.raises(MdevError, match="another interrupt index is enabled"):
            rig.arm(index)
    rig.disable(Irq.MSI)
    assert rig.arm(Irq.INTX).count() == 1


# -- a cause of interrupts through whatever is enabled --------------------------------------------------------------


def test_a_cause_is_a_level_on_the_pin_and_an_edge_in_messages(rig: Rig) -> None:
    line = rig.arm(Irq.INTX)
    rig.irqs.set_cause(True, 2)
    assert line.count() == 1
    rig.disable(Irq.INTX)
    message = rig.arm(Irq.MSIX, 2)
    assert message.count() == 1, "it was there before the messages were"
    rig.irqs.set_cause(True, 2)
    assert message.count() == 0
    rig.irqs.set_cause(False, 2)
    rig.irqs.set_cause(True, 2)
    assert message.count() == 1
    rig.disable(Irq.MSIX)
    assert rig.arm(Irq.INTX).count() == 1, "and it still is"
    rig.irqs.set_cause(False, 2)
    rig.disable(Irq.INTX)
    assert rig.arm(Irq.MSIX, 2).count() == 0, "and now it is not"


def test_a_cause_works_without_any_message_interrupt() -> None:
    irqs = Interrupts(Trigger.signal, pins=1)
    irqs.set_cause(True, 0)
    assert irqs.intx.level


# -- ERR and REQ ----------------------------------------------------------------------------------------------------


def test_error_and_request_stand_beside_the_others(rig: Rig) -> None:
    assert not rig.irqs.error()
    assert not rig.irqs.request()
    rig.arm(Irq.INTX)
    err, req = rig.arm(Irq.ERR), rig.arm(Irq.REQ)
    assert rig.irqs.request()
    assert (err.count(), req.count()) == (0, 1)
    assert rig.irqs.error()
    rig.set(NONE | TRIGGER, Irq.ERR)
    rig.set(BOOL | TRIGGER, Irq.ERR, bools=[True])
    rig.set(BOOL | TRIGGER, Irq.ERR, bools=[False])
    assert (err.count(), req.count()) == (3, 0)
    rig.set(EVENTFD | TRIGGER, Irq.ERR, fds=[-1])
    rig.disable(Irq.REQ)
    assert not err.held()
    assert not req.held()
    assert not rig.irqs.request()


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "index", "start", "count", "bools", "number", "sentence"),
    [
        (NONE | TRIGGER, 5, 0, 1, [], errno.EINVAL, "no interrupt index 5"),
        (NONE | TRIGGER, Irq.INTX, 0, 2, [], errno.EINVAL, "the index has 1 interrupts"),
        (NONE | TRIGGER, Irq.MSIX, 8, 1, [], errno.EINVAL, "the index has 8 interrupts"),
        (NONE | TRIGGER, Irq.MSIX, -1, 1, [], errno.EINVAL, "the index has 8 interrupts"),
        (NONE | TRIGGER, Irq.INTX, 0, 1, [], errno.EINVAL, "INTx is not enabled"),
        (NONE | MASK, Irq.INTX, 0, 1, [], errno.EINVAL, "INTx is not enabled"),
        (NONE | UNMASK, Irq.INTX, 0, 1, [], errno.EINVAL, "INTx is not enabled"),
        (NONE | MASK, Irq.MSI, 0, 1, [], errno.ENOTTY, "interrupt index 1 cannot be masked"),
        (NONE | UNMASK, Irq.MSIX, 0, 1, [], errno.ENOTTY, "interrupt index 2 cannot be masked"),
        (NONE | MASK, Irq.ERR, 0, 1, [], errno.ENOTTY, "interrupt index 3 cannot be masked"),
        (NONE | MASK, Irq.REQ, 0, 1, [], errno.ENOTTY, "interrupt index 4 cannot be masked"),
        (NONE | TRIGGER, Irq.MSI, 0, 1, [], errno.EINVAL, "the index is not enabled"),
        (BOOL | TRIGGER, Irq.MSIX, 0, 2, [True], errno.EINVAL, "1 bools for 2 interrupts"),
        (EVENTFD | TRIGGER, Irq.MSIX, 0, 2, [], errno.EINVAL, "0 descriptors for 2 interrupts"),
        (EVENTFD | TRIGGER, Irq.MSI, 0, 0, [], errno.EINVAL, "no vector to enable"),
        (EVENTFD | TRIGGER, Irq.INTX, 0, 0, [], errno.EINVAL, "INTx is one interrupt"),
        (BOOL | TRIGGER, Irq.ERR, 0, 0, [], errno.EINVAL, "no interrupt named"),
        (NONE | TRIGGER, Irq.ERR, 0, 1, [], errno.EINVAL, "the interrupt is not enabled"),
    ],
)
def test_refusals(
    rig: Rig, flags: IrqSet, index: int, start: int, count: int, bools: list[bool], number: int, sentence: str
) -> None:
    with pytest.raises(MdevError, match=sentence) as caught:
        rig.set(flags, index, start, count, bools=bools)
    assert caught.value.errno == number
    assert rig.irqs.active is None


@pytest.mark.parametrize(("action", "number"), [(MASK, errno.ENOTTY), (UNMASK, errno.ENOTTY), (TRIGGER, errno.EINVAL)])
def test_descriptors_of_a_refused_request_are_closed(rig: Rig, action: IrqSet, number: int) -> None:
    line = rig.line()
    with pytest.raises(MdevError) as caught:
        rig.set(EVENTFD | action, Irq.INTX, 0, 2 if action is TRIGGER else 1, fds=[line.given, -1][: 2 if action is TRIGGER else 1])
    assert caught.value.errno == number
    assert not line.held()


def test_a_bad_descriptor_takes_the_others_with_it(rig: Rig) -> None:
    first, last = rig.line(), rig.line()
    bad = os.dup(first.fd)
    os.close(bad)
    with pytest.raises(OSError, match="Bad file descriptor"):
        rig.set(EVENTFD | TRIGGER, Irq.MSI, 0, 4, fds=[first.given, -1, bad, last.given])
    assert not first.held()
    assert not last.held()


# -- eventfds that are replaced -------------------------------------------------------------------------------------

EVERY = [(Irq.INTX, 0), (Irq.MSI, 2), (Irq.MSIX, 7), (Irq.ERR, 0), (Irq.REQ, 0)]


@pytest.mark.parametrize(("index", "number"), EVERY)
def test_a_client_that_arms_and_triggers_without_end_is_not_remembered(rig: Rig, index: Irq, number: int) -> None:
    for _ in range(50):
        line = rig.arm(index, number)
        rig.set(NONE | TRIGGER, index, number)
        assert line.count() == 1
    assert len(rig.irqs._posted) == 1
    rig.disable(index)
    assert not rig.irqs._posted


@pytest.mark.parametrize("swap", ["replace", "de-assign", "disable"])
@pytest.mark.parametrize(("index", "number"), EVERY)
def test_what_is_owed_to_a_replaced_eventfd_is_dropped(index: Irq, number: int, swap: str) -> None:
    rig = Rig()
    rig.irqs = Interrupts(lambda trigger: None, pins=1, msi=4, msix=8)
    nothing = len(rig.irqs.save())
    rig.arm(index, number)
    rig.set(NONE | TRIGGER, index, number)
    owed = len(rig.irqs.save())
    assert owed > nothing
    if swap == "replace":
        rig.arm(index, number)
    elif swap == "de-assign":
        rig.set(EVENTFD | TRIGGER, index, number, fds=[-1])
    else:
        rig.disable(index)
    assert len(rig.irqs.save()) == nothing
    if swap == "replace":
        rig.set(NONE | TRIGGER, index, number)
        assert len(rig.irqs.save()) == owed, "the new one is owed what was sent since"
    rig.close()


def test_what_is_owed_to_the_others_is_kept() -> None:
    rig = Rig()
    rig.irqs = Interrupts(lambda trigger: None, pins=1, msi=4, msix=8)
    rig.arm(Irq.MSIX, 1)
    rig.arm(Irq.MSIX, 2)
    rig.set(NONE | TRIGGER, Irq.MSIX, 1, 2)
    rig.arm(Irq.MSIX, 2)
    state = rig.irqs.save()
    rig.close()
    other = Rig()
    first, second = other.arm(Irq.MSIX, 1), other.arm(Irq.MSIX, 2)
    other.irqs.load(state)
    assert (first.count(), second.count()) == (1, 0)
    other.close()


# -- life cycle -----------------------------------------------------------------------------------------------------


def test_reset_keeps_eventfds_and_drops_what_the_device_raised(rig: Rig) -> None:
    line = rig.arm(Irq.MSIX, 1)
    rig.irqs.intx.set_level(True)
    rig.irqs.msix.set_masked(0b10)
    rig.irqs.fire(1)
    rig.irqs.reset()
    assert not rig.irqs.intx.level
    assert rig.irqs.msix.pending == 0
    assert rig.irqs.descriptors == 1
    rig.irqs.fire(1)
    assert line.count() == 1


def test_clear_gives_every_descriptor_back(rig: Rig) -> None:
    armed = [rig.arm(Irq.MSIX, 0), rig.arm(Irq.MSIX, 4), rig.arm(Irq.ERR), rig.arm(Irq.REQ)]
    assert rig.irqs.descriptors == 4
    for trigger in rig.irqs.clear():
        trigger.close()
    assert rig.irqs.descriptors == 0
    assert not any(line.held() for line in armed)
    assert not rig.irqs.request()
    rig.irqs.fire(0)
