"""Suspend and resume: children before parents, and back.

Buses and drivers get their callbacks as Linux's device power management gives them (drivers/base/power/main.c): the driver
quiesces its device, then the bus; the parent comes when its devices are down. A refusal resumes what was suspended. Any
thread may call; two at once are refused with EBUSY.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from mdevkit.device import Device, Mdev
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
        with self._alone():
            if everything:
                self._core.suspended = True
            done: list[Parent | Device] = []
            try:
                for item in _children_first(targets):
                    if not item.suspended:
                        self._suspend(item)
                        done.append(item)
            except MdevError:
                self._core.suspended = self._core.suspended and not everything
                self._resume_all(reversed(done))
                raise

    def resume(self, targets: Sequence[Parent | Mdev], *, everything: bool) -> None:
        """See `Registry.resume`."""
        with self._alone():
            if everything:
                self._core.suspended = False
            error = self._resume_all(item for item in reversed(list(_children_first(targets))) if item.suspended)
        if everything:
            self._core.retry_deferred()
        if error is not None:
            raise error

    def _alone(self) -> _Alone:
        return _Alone(self._busy)

    def _suspend(self, item: Parent | Device) -> None:
        if isinstance(item, Parent):
            item.hooks.suspend(item)
        elif item.driver is not None:
            driver, bus = self._core.drivers[item.bus, item.driver], self._core.bus(item.bus)
            driver.suspend(item)
            try:
                bus.suspend(item)
            except MdevError:
                driver.resume(item)
                raise
        item.suspended = True

    def _resume_all(self, items: Iterator[Parent | Device]) -> MdevError | None:
        """Resume each; return the first error, since the others must come back all the same."""
        first = None
        for item in items:
            item.suspended = False
            try:
                self._resume(item)
            except MdevError as error:
                first = first or error
        return first

    def _resume(self, item: Parent | Device) -> None:
        if isinstance(item, Parent):
            item.hooks.resume(item)
        elif item.driver is not None:
            self._core.bus(item.bus).resume(item)
            self._core.drivers[item.bus, item.driver].resume(item)


class _Alone:
    """Holds a lock without waiting for it: EBUSY when another thread has it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise MdevError(errno.EBUSY, "a suspend or resume is running")

    def __exit__(self, *error: object) -> None:
        self._lock.release()


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
