"""Calls hooks: one pluggy manager per owner, holding that owner and every wrapper.

The only module that knows pluggy's manager. With one manager per owner a call costs about two microseconds and can reach
nobody but the owner and the wrappers; with a shared one it would reach every owner. A plugin's exception never leaves here
raw (`mdevkit.errors.wrap`). Calls may come from any thread; the managers do not change after they are made.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pluggy

from mdevkit.errors import MdevError, wrap
from mdevkit.hookspecs import BusSpec, DriverSpec, ParentSpec

if TYPE_CHECKING:
    from mdevkit.bus import Bus
    from mdevkit.device import Device, Mdev
    from mdevkit.driver import Driver, Endpoint
    from mdevkit.parent import Parent, ParentOps

_SPECS: Final = (ParentSpec, BusSpec, DriverSpec)


def implementations(plugin: object) -> dict[str, Mapping[str, Any]]:
    """Return the hook implementations of `plugin`: name to pluggy's options. Does not evaluate its properties."""
    found = {}
    for name in dir(plugin):
        if callable(getattr(type(plugin), name, None)) or name in getattr(plugin, "__dict__", {}):
            options = getattr(getattr(plugin, name, None), "mdevkit_impl", None)
            if isinstance(options, Mapping):
                found[options.get("specname") or name] = options
    return found


def check_wrapper(plugin: object) -> None:
    """Refuse a wrapper that could not be used: EINVAL with the reason."""
    found = implementations(plugin)
    owned = [name for name, options in found.items() if not options.get("wrapper")]
    if owned:
        raise MdevError(
            errno.EINVAL,
            f"{_name(plugin)} implements {', '.join(owned)}, which only an owner may do: "
            "wrap it with @hookimpl(wrapper=True), or subclass ParentOps, Bus or Driver",
            plugin,
        )
    if not found:
        raise MdevError(errno.EINVAL, f"{_name(plugin)} implements no hook", plugin)
    _manager(plugin, ())


def _name(plugin: object) -> str:
    return f"{type(plugin).__module__}.{type(plugin).__qualname__}"


def _manager(owner: object, wrappers: Iterable[object]) -> pluggy.PluginManager:
    """Return a checked manager; EINVAL for a wrong signature or an unknown hook."""
    manager = pluggy.PluginManager("mdevkit")
    for spec in _SPECS:
        manager.add_hookspecs(spec)
    try:
        manager.register(owner)
        for wrapper in wrappers:
            manager.register(wrapper)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise MdevError(errno.EINVAL, f"{_name(error.plugin)}: {reason}", error.plugin) from error
    return manager


class _Hooks:
    """The hooks of one owner, ready to call."""

    spec: ClassVar[type]
    required: ClassVar[tuple[str, ...]] = ()

    def __init__(self, owner: Any, wrappers: Iterable[object]) -> None:
        if isinstance(owner, type):
            raise MdevError(errno.EINVAL, f"{owner.__qualname__} is a class; an instance is wanted", owner)
        found = implementations(owner)
        missing = [name for name in self.required if name not in found]
        if missing:
            raise MdevError(errno.EINVAL, f"{_name(owner)} does not implement {', '.join(missing)}", owner)
        foreign = [name for name in found if any(hasattr(spec, name) for spec in _SPECS) and not hasattr(self.spec, name)]
        if foreign:
            raise MdevError(errno.EINVAL, f"{_name(owner)} implements {', '.join(foreign)}, which it does not own", owner)
        self._hook: Final = _manager(owner, wrappers).hook

    def _call(self, hook: str, doing: str, subject: Any, **arguments: Any) -> Any:
        try:
            return getattr(self._hook, hook)(**arguments)
        except (Exception, SystemExit) as error:
            raise wrap(error, f"{subject}: {doing}", subject) from error


class ParentHooks(_Hooks):
    """A parent driver's hooks, typed; see `ParentSpec`."""

    spec = ParentSpec
    required = ("parent_create", "parent_remove")

    def __init__(self, owner: ParentOps, wrappers: Iterable[object] = ()) -> None:
        super().__init__(owner, wrappers)

    def create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Call `parent_create`."""
        self._call("parent_create", "create failed", mdev, mdev=mdev, params=params)

    def remove(self, mdev: Mdev) -> None:
        """Call `parent_remove`."""
        self._call("parent_remove", "remove failed", mdev, mdev=mdev)

    def unregister(self, parent: Parent) -> None:
        """Call `parent_unregister`."""
        self._call("parent_unregister", "unregister failed", parent, parent=parent)

    def suspend(self, parent: Parent) -> None:
        """Call `parent_suspend`."""
        self._call("parent_suspend", "suspend refused", parent, parent=parent)

    def resume(self, parent: Parent) -> None:
        """Call `parent_resume`."""
        self._call("parent_resume", "resume failed", parent, parent=parent)


class BusHooks(_Hooks):
    """A class bus's hooks, typed; see `BusSpec`."""

    spec = BusSpec
    required = ("bus_match", "bus_uevent")

    def __init__(self, owner: Bus, wrappers: Iterable[object] = ()) -> None:
        super().__init__(owner, wrappers)
        self.bus: Final = owner

    def match(self, device: Device, driver: Driver) -> bool:
        """Call `bus_match`."""
        return bool(self._call("bus_match", "match failed", device, device=device, driver=driver))

    def uevent(self, device: Device) -> dict[str, str]:
        """Call `bus_uevent`."""
        return dict(self._call("bus_uevent", "uevent failed", device, device=device))

    def probe(self, device: Device, driver: Driver) -> None:
        """Call `bus_probe`."""
        self._call("bus_probe", f"bus {self.bus.name}: probe failed", device, device=device, driver=driver)

    def remove(self, device: Device) -> None:
        """Call `bus_remove`."""
        self._call("bus_remove", f"bus {self.bus.name}: remove failed", device, device=device)

    def suspend(self, device: Device) -> None:
        """Call `bus_suspend`."""
        self._call("bus_suspend", f"bus {self.bus.name}: suspend refused", device, device=device)

    def resume(self, device: Device) -> None:
        """Call `bus_resume`."""
        self._call("bus_resume", f"bus {self.bus.name}: resume failed", device, device=device)


class DriverHooks(_Hooks):
    """A driver's hooks, typed; see `DriverSpec`."""

    spec = DriverSpec
    required = ("driver_probe", "driver_remove")

    def __init__(self, owner: Driver, wrappers: Iterable[object] = ()) -> None:
        super().__init__(owner, wrappers)
        self.driver: Final = owner

    def probe(self, device: Device) -> Endpoint | None:
        """Call `driver_probe`."""
        endpoint: Endpoint | None = self._call("driver_probe", self._doing("probe failed"), device, device=device)
        return endpoint

    def remove(self, device: Device) -> None:
        """Call `driver_remove`."""
        self._call("driver_remove", self._doing("remove failed"), device, device=device)

    def let_go(self, device: Device, timeout: float, force: bool) -> None:
        """Call `driver_let_go`."""
        self._call("driver_let_go", self._doing("busy"), device, device=device, timeout=timeout, force=force)

    def suspend(self, device: Device) -> None:
        """Call `driver_suspend`."""
        self._call("driver_suspend", self._doing("suspend refused"), device, device=device)

    def resume(self, device: Device) -> None:
        """Call `driver_resume`."""
        self._call("driver_resume", self._doing("resume failed"), device, device=device)

    def _doing(self, what: str) -> str:
        return f"driver {self.driver.name}: {what}"
