"""Suspend and resume: children before parents, and back.

Buses and drivers get their callbacks as Linux's device power management gives them (drivers/base/power/main.c): the driver
quiesces its device, then the bus; the parent comes when its devices are down. A refusal resumes what was suspended. A device
is claimed while its callbacks run, so it is not bound, unbound or removed meanwhile. Any thread may call; two at once are
refused with EBUSY.

Nothing runs below what sleeps. What is to be suspended is marked before its devices are looked up: a probe that finds the mark
is deferred, so a device that comes later does not run, and one that was in its creation's probe is found when it is published
(`DriverCore.put_off`); not so what a vendor's create has added and bound below a device that itself is not bound. A removal that
may yet be refused is waited for: its device may stay. The end of a sleep wakes whatever it has deferred.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from mdevkit.device import Device, Mdev, State
from mdevkit.dispatch import quietly
from mdevkit.errors import MdevError
from mdevkit.parent import Parent

if TYPE_CHECKING:
    from mdevkit.dd import DriverCore

#: Looks up what is to be suspended or resumed.
Targets = Callable[[], Sequence[Parent | Device]]


class Power:
    """Suspends and resumes the devices of one registry."""

    def __init__(self, core: DriverCore) -> None:
        self._core: Final = core
        self._busy: Final = threading.Lock()

    def suspend(self, targets: Targets, *, everything: bool) -> None:
        """See `Registry.suspend`."""
        try:
            with self._alone():
                self._suspend_all(targets, everything)
        except BaseException:
            # A probe that was deferred while we tried waits for no other bind.
            self._core.wake()
            raise

    def _suspend_all(self, targets: Targets, everything: bool) -> None:
        before = self._core.suspended
        self._core.suspended = before or everything
        done: list[Parent | Device] = []
        try:
            with _marked(targets()) as found:
                for item in _children_first(found):
                    self._suspend(item, done)
        except BaseException:
            self._core.suspended = before
            self._resume_all(reversed(done))
            raise

    def resume(self, targets: Targets, *, everything: bool) -> None:
        """See `Registry.resume`."""
        with self._alone():
            found = targets()
            for target in found:
                if isinstance(target, Mdev) and target.parent.suspended:
                    raise MdevError(errno.EBUSY, f"{target}: {target.parent} is suspended; resume that", target)
            if everything:
                self._core.suspended = False
            errors = self._resume_all(reversed(list(_children_first(found))))
        self._core.wake()
        if errors:
            raise errors[0]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Admit one suspend or resume at a time; a vendor's callback that asks for another gets EBUSY too."""
        if not self._busy.acquire(blocking=False):
            raise MdevError(errno.EBUSY, "a suspend or resume is running")
        try:
            yield
        finally:
            self._busy.release()

    def _suspend(self, item: Parent | Device, done: list[Parent | Device]) -> None:
        """Suspend one item and add it to `done`; not one that is suspended already, or going away."""
        if isinstance(item, Device):
            self._suspend_device(item, done)
        elif not (item.suspended or item.leaving):
            item.hooks.suspend(item)
            item.suspended = True
            done.append(item)

    def _suspend_device(self, device: Device, done: list[Parent | Device]) -> None:
        before = _claim(device, State.SUSPENDING)
        if before is None:
            return
        try:
            if not device.suspended:
                if device.driver is not None:
                    self._quiesce(device, device.driver)
                device.suspended = True
                done.append(device)
        finally:
            device.settle(before)

    def _quiesce(self, device: Device, name: str) -> None:
        driver, bus = self._core.drivers[device.bus, name], self._core.bus(device.bus)
        driver.suspend(device)
        try:
            bus.suspend(device)
        except BaseException:
            quietly(lambda: driver.resume(device))
            raise

    def _resume_all(self, items: Iterable[Parent | Device]) -> list[MdevError]:
        """Resume each; return the errors, since the others must come back all the same."""
        errors: list[MdevError] = []
        for item in items:
            _collect(errors, partial(self._resume, item))
        return errors

    def _resume(self, item: Parent | Device) -> None:
        if isinstance(item, Device):
            self._resume_device(item)
        elif item.suspended:
            item.suspended = False
            item.hooks.resume(item)

    def _resume_device(self, device: Device) -> None:
        before = _claim(device, State.RESUMING)
        if before is None:
            return
        try:
            if device.suspended and device.driver is not None:
                self._wake(device, device.driver)
        finally:
            device.suspended = False
            device.settle(before)

    def _wake(self, device: Device, name: str) -> None:
        driver, bus = self._core.drivers[device.bus, name], self._core.bus(device.bus)
        try:
            bus.resume(device)
        finally:
            driver.resume(device)


@contextmanager
def _marked(targets: Sequence[Parent | Device]) -> Iterator[Sequence[Parent | Device]]:
    """Have nothing probed at or below the targets."""
    try:
        for target in targets:
            target.suspending = True
        yield targets
    finally:
        for target in targets:
            target.suspending = False


def _claim(device: Device, wanted: State) -> State | None:
    """Claim a device and return what it was; None when it is being created or is going away, once that is certain."""
    with device.lock:
        while True:
            try:
                return device.claim(wanted)
            except MdevError as error:
                if error.errno == errno.EDEADLK:
                    raise
            if not device.undecided:
                return None
            if device.claimed_here:
                raise MdevError(errno.EDEADLK, f"{device} is {device.state} on this very thread", device)
            device.lock.wait()


def _collect(errors: list[MdevError], call: Callable[[], None]) -> None:
    try:
        call()
    except MdevError as error:
        errors.append(error)


def _children_first(targets: Sequence[Parent | Device]) -> Iterator[Parent | Device]:
    """Yield the targets, last first, each after everything below it."""
    for target in reversed(targets):
        yield from _subtree(target)


def _subtree(item: Parent | Device) -> Iterator[Parent | Device]:
    """Yield what is below an item, newest first, then the item; mdevs before their parent's own devices, which they may use."""
    with item.lock:  # a device that is published later finds the mark
        below = list(item.children.values())
        if isinstance(item, Parent):
            below.extend(item.mdevs.values())
    for child in reversed(below):
        yield from _subtree(child)
    yield item
