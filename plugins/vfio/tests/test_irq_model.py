"""Random SET_IRQS, device events and config bits against a model of VFIO's interrupts written apart from the code.

The model keeps, for every eventfd, how often it should have been signalled; the machine compares with the real counters.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from mdevkit.errors import MdevError
from mdevkit_vfio.irq import Interrupts, Trigger
from mdevkit_vfio.ops import IrqRequest
from mdevkit_vfio.uapi import IrqSet

COUNTS = [1, 4, 8, 1, 1]  # INTx, MSI, MSI-X, ERR, REQ


class Fd:
    """One eventfd, and the signals the model expects on it."""

    def __init__(self) -> None:
        self.mine = os.eventfd(0, os.EFD_NONBLOCK)
        self.given = os.dup(self.mine)
        self.expected = 0
        self.seen = 0

    def look(self) -> int:
        with contextlib.suppress(BlockingIOError):
            self.seen += os.eventfd_read(self.mine)
        return self.seen


@dataclass
class Messages:
    """The model's MSI or MSI-X."""

    grows: bool
    on: bool = False
    room: int = 0
    fds: dict[int, Fd] = field(default_factory=dict)
    masked: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)
    enable_bit: bool = False
    all_masked: bool = False

    def settle(self) -> None:
        for vector in sorted(self.waiting):
            if self.on and not self.all_masked and vector not in self.masked and vector in self.fds:
                self.waiting.discard(vector)
                self.fds[vector].expected += 1


class RefusedError(Exception):
    pass


class Model:
    """What VFIO's documentation and the kernel's vfio-pci say, one rule after the other."""

    def __init__(self) -> None:
        self.pin: Fd | None = None
        self.level = self.masked = self.disabled = False
        self.messages = {1: Messages(grows=False), 2: Messages(grows=True)}
        self.single: dict[int, Fd | None] = {3: None, 4: None}

    def pin_settle(self) -> None:
        if self.pin and self.level and not self.masked and not self.disabled:
            self.masked = True
            self.pin.expected += 1

    def type(self) -> int | None:
        if self.pin:
            return 0
        return next((index for index, messages in self.messages.items() if messages.on), None)

    def set_irqs(self, action: str, data: str, index: int, start: int, values: list[bool] | list[Fd | None] | int) -> None:
        count = values if isinstance(values, int) else len(values)
        if start + count > COUNTS[index]:
            raise RefusedError(errno.EINVAL)
        if action != "trigger":
            self.mask(action, data, index, count, values)
        elif data == "none" and count == 0:
            self.disable(index)
        elif index == 0:
            self.trigger_pin(data, count, values)
        elif index in self.messages:
            self.trigger_messages(data, index, start, count, values)
        else:
            self.trigger_single(data, index, count, values)

    def mask(self, action: str, data: str, index: int, count: int, values: object) -> None:
        if index != 0 or data == "eventfd":
            raise RefusedError(errno.ENOTTY)
        if not self.pin or count != 1:
            raise RefusedError(errno.EINVAL)
        if data == "none" or values == [True]:
            self.masked = action == "mask"
            self.pin_settle()

    def disable(self, index: int) -> None:
        if index == 0:
            self.pin, self.masked = None, False
        elif index in self.messages:
            self.messages[index].on = False
            self.messages[index].fds.clear()
        else:
            self.single[index] = None

    def trigger_pin(self, data: str, count: int, values: object) -> None:
        if count != 1 or self.type() not in (None, 0):
            raise RefusedError(errno.EINVAL)
        if data == "eventfd":
            assert isinstance(values, list)
            self.pin, self.masked = values[0], False
            self.pin_settle()
        elif not self.pin:
            raise RefusedError(errno.EINVAL)
        elif (data == "none" or values == [True]) and not self.disabled:
            self.pin.expected += 1

    def trigger_messages(self, data: str, index: int, start: int, count: int, values: object) -> None:
        messages = self.messages[index]
        if self.type() not in (None, index):
            raise RefusedError(errno.EINVAL)
        if data != "eventfd":
            if not messages.on:
                raise RefusedError(errno.EINVAL)
            for vector in range(start, start + count):
                if (data == "none" or (isinstance(values, list) and values[vector - start])) and vector in messages.fds:
                    messages.fds[vector].expected += 1
            return
        if not messages.on and count == 0:
            raise RefusedError(errno.EINVAL)
        if not messages.grows and messages.on and start + count > messages.room:
            raise RefusedError(errno.EINVAL)
        if not messages.on:
            messages.on, messages.room = True, start + count
        assert isinstance(values, list)
        for vector, fd in enumerate(values, start):
            messages.fds.pop(vector, None)
            if fd:
                messages.fds[vector] = fd
        messages.settle()

    def trigger_single(self, data: str, index: int, count: int, values: object) -> None:
        if count == 0 or (data == "none" and self.single[index] is None):
            raise RefusedError(errno.EINVAL)
        if data == "eventfd":
            assert isinstance(values, list)
            self.single[index] = values[0]
        elif (data == "none" or values == [True]) and (fd := self.single[index]):
            fd.expected += 1

    def fire(self, vector: int) -> None:
        on = [m for i, m in sorted(self.messages.items(), reverse=True) if m.on]
        enabled = [m for i, m in sorted(self.messages.items(), reverse=True) if m.enable_bit]
        for messages in [*on, *enabled][:1]:
            messages.waiting.add(vector)
            messages.settle()

    def held(self) -> set[Fd]:
        all_fds = [self.pin, *self.single.values(), *self.messages[1].fds.values(), *self.messages[2].fds.values()]
        return {fd for fd in all_fds if fd}


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


DATA = {"none": IrqSet.DATA_NONE, "bool": IrqSet.DATA_BOOL, "eventfd": IrqSet.DATA_EVENTFD}
ACTION = {"mask": IrqSet.ACTION_MASK, "unmask": IrqSet.ACTION_UNMASK, "trigger": IrqSet.ACTION_TRIGGER}


class InterruptMachine(RuleBasedStateMachine):
    """Drives both."""

    def __init__(self) -> None:
        super().__init__()
        self.irqs = Interrupts(Trigger.signal, pins=1, msi=4, msix=8)
        self.model = Model()
        self.fds: list[Fd] = []
        self.before = open_files()

    def new_fd(self) -> Fd:
        self.fds.append(Fd())
        return self.fds[-1]

    @rule(
        action=st.sampled_from(["trigger", "trigger", "trigger", "unmask", "mask"]),
        data=st.sampled_from(["none", "bool", "eventfd", "eventfd"]),
        index=st.sampled_from([0, 0, 1, 1, 2, 2, 3, 4]),
        start=st.integers(0, 3),
        bits=st.lists(st.booleans(), max_size=5),
    )
    def any_request(self, action: str, data: str, index: int, start: int, bits: list[bool]) -> None:
        self.request(action, data, index, start, bits)

    @rule(
        action=st.sampled_from(["trigger", "unmask", "mask"]), data=st.sampled_from(["none", "bool", "eventfd"]), bit=st.booleans()
    )
    def pin_request(self, action: str, data: str, bit: bool) -> None:
        self.request(action, data, 0, 0, [bit])

    @rule(index=st.integers(0, 4))
    def disable(self, index: int) -> None:
        self.request("trigger", "none", index, 0, [])

    @rule(index=st.integers(1, 2), start=st.integers(0, 3), bits=st.lists(st.booleans(), min_size=1, max_size=4))
    def arm_messages(self, index: int, start: int, bits: list[bool]) -> None:
        self.request("trigger", "eventfd", index, start, bits)

    def request(self, action: str, data: str, index: int, start: int, bits: list[bool]) -> None:
        fds = [self.new_fd() if bit else None for bit in bits] if data == "eventfd" else []
        values: list[bool] | list[Fd | None] | int = fds if data == "eventfd" else bits if data == "bool" else len(bits)
        try:
            self.model.set_irqs(action, data, index, start, values)
            expected = 0
        except RefusedError as refused:
            expected = refused.args[0]
        request = IrqRequest(
            ACTION[action] | DATA[data],
            index,
            start,
            len(bits),
            bits if data == "bool" else (),
            [fd.given if fd else -1 for fd in fds],
        )
        assert self.real(request) == expected

    def real(self, request: IrqRequest) -> int | None:
        try:
            for trigger in self.irqs.set_irqs(request):
                trigger.close()
        except MdevError as error:
            return error.errno
        return 0

    @rule(level=st.booleans())
    def drive_the_pin(self, level: bool) -> None:
        self.irqs.intx.set_level(level)
        self.model.level = level
        self.model.pin_settle()

    @rule(disabled=st.booleans())
    def interrupt_disable(self, disabled: bool) -> None:
        self.irqs.intx.set_disabled(disabled)
        self.model.disabled = disabled
        self.model.pin_settle()

    @rule(vector=st.integers(0, 3))
    def fire(self, vector: int) -> None:
        self.irqs.fire(vector)
        self.model.fire(vector)

    @rule(index=st.integers(1, 2), masked=st.sets(st.integers(0, 3)))
    def mask_vectors(self, index: int, masked: set[int]) -> None:
        (self.irqs.msi if index == 1 else self.irqs.msix).set_masked(sum(1 << vector for vector in masked))
        self.model.messages[index].masked = set(masked)
        self.model.messages[index].settle()

    @rule(index=st.integers(1, 2), enabled=st.booleans(), masked=st.booleans())
    def control(self, index: int, enabled: bool, masked: bool) -> None:
        (self.irqs.msi if index == 1 else self.irqs.msix).set_control(enabled, masked)
        messages = self.model.messages[index]
        if messages.enable_bit and not enabled:
            messages.waiting.clear()
        messages.enable_bit, messages.all_masked = enabled, masked
        messages.settle()

    @rule()
    def reset(self) -> None:
        self.irqs.reset()
        self.model.level = self.model.disabled = False
        for messages in self.model.messages.values():
            messages.masked, messages.waiting = set(), set()
            messages.enable_bit = messages.all_masked = False

    @rule()
    def client_leaves(self) -> None:
        for trigger in self.irqs.clear():
            trigger.close()
        for index in range(5):
            self.model.disable(index)

    @invariant()
    def signals_match(self) -> None:
        for fd in self.fds:
            assert fd.look() == fd.expected

    @invariant()
    def descriptors_match(self) -> None:
        held = len(self.model.held())
        assert self.irqs.descriptors == held
        assert open_files() == self.before + len(self.fds) + held

    def teardown(self) -> None:
        self.client_leaves()
        self.signals_match()
        for fd in self.fds:
            os.close(fd.mine)


TestInterrupts = InterruptMachine.TestCase
TestInterrupts.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
