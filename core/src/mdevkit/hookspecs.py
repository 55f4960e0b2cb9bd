"""The contracts between core and plugins: three families of hooks, one class each.

The owner of a family's object (a parent driver, a class bus, a driver) implements its hooks; anybody else may wrap them
(``@hookimpl(wrapper=True)``): quotas, audit, tracing and fault injection need no change to anybody's code. Every hook has one
owner, so it returns one value, not a list. Core holds no lock while a hook runs. A hook fails by raising `MdevError`, or
any `OSError`; another exception is reported as the plugin's bug with EIO.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from mdevkit.device import Device, Mdev
    from mdevkit.driver import Driver, Endpoint
    from mdevkit.parent import Parent

hookspec = pluggy.HookspecMarker("mdevkit")
#: Marks a method as an implementation of a hook.
hookimpl = pluggy.HookimplMarker("mdevkit")


class ParentSpec:
    """What a parent driver implements (mdev_parent_ops)."""

    @hookspec(firstresult=True)
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Build the device behind `mdev` and set its class and ops by the typed setter of its bus. Required.

        Called once per device, by ``Registry.create``, on the creator's thread; several creates of one parent may run at once.
        `params` holds every create parameter of the type, checked, defaults filled in. The instance is already accounted for. If
        this raises, `parent_remove` is not called: undo what was done. The error reaches the creator with its reason.
        """

    @hookspec(firstresult=True)
    def parent_remove(self, mdev: Mdev) -> None:
        """Take the device down and free what it holds. Required. It is unbound already, and cannot be kept: errors are logged only.

        No attribute of the device is in use any more, but for one that removes its own device on this thread, or has not returned
        for seconds. Called once for each create that returned, also when the create failed later (no class set, the driver's
        probe failed).
        """

    @hookspec(firstresult=True)
    def parent_unregister(self, parent: Parent) -> None:
        """Stop what the parent driver started: the parent leaves, and every device of it is removed."""

    @hookspec(firstresult=True)
    def parent_suspend(self, parent: Parent) -> None:
        """Suspend the parent itself: its devices are suspended. Raising refuses, and everything is resumed."""

    @hookspec(firstresult=True)
    def parent_resume(self, parent: Parent) -> None:
        """Resume the parent itself, before the first of its devices."""


class BusSpec:
    """What a class bus implements (struct bus_type)."""

    @hookspec(firstresult=True)
    def bus_match(self, device: Device, driver: Driver) -> bool | None:
        """Tell whether `driver` is for `device`; `Bus` compares ``device.match`` with the id table."""

    @hookspec(firstresult=True)
    def bus_uevent(self, device: Device) -> dict[str, str] | None:
        """Return the variables of the device's events."""

    @hookspec(firstresult=True)
    def bus_probe(self, device: Device, driver: Driver) -> None:
        """Prepare `device` for `driver`, before the driver's own probe; raising fails the probe."""

    @hookspec(firstresult=True)
    def bus_remove(self, device: Device) -> None:
        """Undo `bus_probe`, after the driver's own remove or failed probe; errors are logged only."""

    @hookspec(firstresult=True)
    def bus_suspend(self, device: Device) -> None:
        """Do the bus's part of suspending `device`, after its driver's; raising refuses."""

    @hookspec(firstresult=True)
    def bus_resume(self, device: Device) -> None:
        """Do the bus's part of resuming `device`, before its driver's."""


class DriverSpec:
    """What a driver implements (struct device_driver)."""

    @hookspec(firstresult=True)
    def driver_probe(self, device: Device) -> Endpoint | None:
        """Take the device and return what it offers to the outside, if anything. Required.

        ENODEV: not mine. `ProbeDeferredError`: later. Anything else: failed. After a failure the next matching driver is tried.
        A probe that raises takes away the devices it has added below this one first. Those that bind wake deferred probes when
        this probe has succeeded, not before, so that asking to be deferred after adding one does not wake this very probe.
        """

    @hookspec(firstresult=True)
    def driver_remove(self, device: Device) -> None:
        """Give the device back; its users are gone already (`driver_let_go`). Required. Errors are logged only."""

    @hookspec(firstresult=True)
    def driver_let_go(self, device: Device, timeout: float, force: bool) -> None:
        """Make the user of the device let go of it and admit no other, up to `timeout` seconds; with `force`, close it.

        EBUSY with the user's pid when it holds on: the device then stays bound, usable as before.
        """

    @hookspec(firstresult=True)
    def driver_suspend(self, device: Device) -> None:
        """Quiesce the device; raising refuses the suspend."""

    @hookspec(firstresult=True)
    def driver_resume(self, device: Device) -> None:
        """Go on."""


__all__ = ["BusSpec", "DriverSpec", "ParentSpec", "hookimpl", "hookspec"]
