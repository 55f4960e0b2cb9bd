"""Suspend and resume: children before parents, and back.

Buses and drivers get their callbacks as Linux's device power management gives them (drivers/base/power/main.c): the driver
quiesces its device, then the bus; the parent comes when its devices are down. A refusal resumes what was suspended. A device
is claimed while its callbacks run, so it is not bound, unbound or removed meanwhile. Any thread may call; two at once are
refused with EBUSY.
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


class Power:
    """Suspends and resumes the devices of one registry."""

    def __init__(self, core: DriverCore) -> None:
        self._core: Final = core
        self._busy: Final = threading.Lock()

    def suspend(self, targets: Sequence[Parent | Mdev], *, everything: bool) -> None:
        """See `Registry.suspend`."""
        try:
            with self._alone():
                self._suspend_all(targets, everything)
        except MdevError:
            # A probe that was deferred while we tried waits for no other bind.
            self._core.retry_deferred()
            raise

    def _suspend_all(self, targets: Sequence[Parent | Mdev], everything: bool) -> None:
        before = self._core.suspended
        self._core.suspended = before or everything
        done: list[Parent | Device] = []
        try:
            for item in _children_first(targets):
                self._suspend(item, done)
        except BaseException:
            self._core.suspended = before
            self._resume_all(reversed(done))
            raise

    def resume(self, targets: Sequence[Parent | Mdev], *, everything: bool) -> None:
        """See `Registry.resume`."""
        for target in targets:
            if isinstance(target, Mdev) and target.parent.suspended:
                raise MdevError(errno.EBUSY, f"{target}: {target.parent} is suspended; resume that", target)
        with self._alone():
            if everything:
                self._core.suspended = False
            errors = self._resume_all(reversed(list(_children_first(targets))))
        self._core.retry_deferred()
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


def _claim(device: Device, wanted: State) -> State | None:
    """Claim a device and return what it was; None when it is going away."""
    try:
        return device.claim(wanted)
    except MdevError as error:
        if error.errno == errno.EDEADLK:
            raise
        return None


def _collect(errors: list[MdevError], call: Callable[[], None]) -> None:
    try:
        call()
    except MdevError as error:
        errors.append(error)


def _children_first(targets: Sequence[Parent | Mdev]) -> Iterator[Parent | Device]:
    """Yield devices, newest first, each after what hangs below it, then their parent; parents newest first."""
    for target in reversed(targets):
        if isinstance(target, Parent):
            for mdev in reversed(list(target.mdevs.values())):
                yield from _subtree(mdev)
            yield target
        else:
            yield from _subtree(target)


def _subtree(device: Device) -> Iterator[Device]:
    for child in reversed(list(device.children.values())):
        yield from _subtree(child)
    yield device
