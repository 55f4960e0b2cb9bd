"""Calls hooks: one pluggy manager per owner, holding that owner and every wrapper.

The only module that knows pluggy's manager. With one manager per owner a call costs about two microseconds and can reach
nobody but the owner and the wrappers; with a shared one it would reach every owner. A plugin's exception never leaves here
raw (`mdevkit.errors.wrap`). Calls may come from any thread; the managers do not change after they are made.

A wrapper may fail a call after the owner has done its part. Whoever called must then find nothing done, so hooks that come
in pairs (create and remove, probe and remove, suspend and resume) are undone here. Nor can a wrapper pass off the owner's
failure as a success, or keep from the owner a call that nobody can refuse (remove, unregister, resume): core goes on as if it
were done. What the owner itself did is seen by a `_Witness`, the innermost wrapper.
"""

from __future__ import annotations

import errno
import inspect
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pluggy

from mdevkit.errors import Guard, MdevError, wrap
from mdevkit.hookspecs import BusSpec, DriverSpec, ParentSpec, hookimpl

if TYPE_CHECKING:
    from pluggy import HookimplOpts

    from mdevkit.bus import Bus
    from mdevkit.device import Device, Mdev
    from mdevkit.driver import Driver, Endpoint
    from mdevkit.parent import Parent, ParentOps

log = logging.getLogger(__name__)

#: Takes back what a hook did, given what it answered.
Undo = Callable[[Any], None]

_SPECS: Final = (ParentSpec, BusSpec, DriverSpec)
_HOOKS: Final = frozenset(name for spec in _SPECS for name in vars(spec) if not name.startswith("_"))


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
    _refuse_class(plugin)
    found = implementations(plugin)
    _refuse_unmarked(plugin, found)
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
    if inspect.ismodule(plugin):
        return plugin.__name__
    return f"{type(plugin).__module__}.{type(plugin).__qualname__}"


def _refuse_class(plugin: object) -> None:
    if isinstance(plugin, type):
        raise MdevError(errno.EINVAL, f"{plugin.__qualname__} is a class; an instance is wanted", plugin)


def _refuse_unmarked(plugin: object, found: Mapping[str, Any]) -> None:
    """Refuse a method that looks like a hook and would never be called."""
    unmarked = sorted(name for name in _HOOKS.difference(found) if callable(getattr(plugin, name, None)))
    if unmarked:
        raise MdevError(errno.EINVAL, f"{_name(plugin)}: {', '.join(unmarked)} must be marked with @hookimpl", plugin)


class _Manager(pluggy.PluginManager):
    """Takes the hooks that `implementations` finds: pluggy before 1.7 evaluates every property of a plugin in search of more."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> HookimplOpts | None:
        if isinstance(inspect.getattr_static(plugin, name, None), property):
            return None
        return super().parse_hookimpl_opts(plugin, name)


class _Witness:
    """Sees what the owner of a hook did, whatever the wrappers around it make of that."""

    def __init__(self) -> None:
        self._threads: Final = threading.local()

    @contextmanager
    def watch(self) -> Iterator[list[Any]]:
        """Collect what the owner did when called inside the block.

        Of a hook that can be refused that is its answer; nothing is in the list if it raised. Of one that cannot, the list has
        something in it as soon as the owner is called.
        """
        outer = getattr(self._threads, "seen", None)
        seen: list[Any] = []
        self._threads.seen = seen
        try:
            yield seen
        finally:
            self._threads.seen = outer

    @hookimpl(wrapper=True, trylast=True)
    def parent_create(self) -> Generator[None, Any, Any]:
        answer = yield
        self._threads.seen.append(answer)
        return answer

    @hookimpl(wrapper=True, trylast=True)
    def parent_remove(self) -> Generator[None, Any, Any]:
        self._threads.seen.append(None)
        return (yield)

    parent_suspend = bus_probe = bus_suspend = driver_probe = driver_suspend = parent_create
    parent_unregister = parent_resume = bus_remove = bus_resume = driver_remove = driver_resume = parent_remove


def _manager(owner: object, wrappers: Iterable[object]) -> pluggy.PluginManager:
    """Return a checked manager; EINVAL for a wrong signature or an unknown hook."""
    manager = _Manager("mdevkit")
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


def quietly(call: Callable[[], None]) -> None:
    """Make a call whose failure cannot stop what is under way; it is logged."""
    try:
        call()
    except MdevError as error:
        log.error("%s", error)


def _call(hooks: pluggy.HookRelay, hook: str, doing: str, subject: Any, **arguments: Any) -> Any:
    """Call a hook, as under a `Guard`, whose sentence would cost as much as the call."""
    try:
        return getattr(hooks, hook)(**arguments)
    except MdevError as error:
        wrap(error, doing, subject)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise wrap(error, f"{subject}: {doing}", subject) from error


class _Hooks:
    """The hooks of one owner, ready to call."""

    spec: ClassVar[type]
    required: ClassVar[tuple[str, ...]] = ()

    def __init__(self, owner: Any, wrappers: Iterable[object]) -> None:
        _refuse_class(owner)
        found = implementations(owner)
        _refuse_unmarked(owner, found)
        missing = [name for name in self.required if name not in found]
        if missing:
            raise MdevError(errno.EINVAL, f"{_name(owner)} does not implement {', '.join(missing)}", owner)
        foreign = [name for name in found if name in _HOOKS and not hasattr(self.spec, name)]
        if foreign:
            raise MdevError(errno.EINVAL, f"{_name(owner)} implements {', '.join(foreign)}, which it does not own", owner)
        wrappers = list(wrappers)
        self._witness: Final = _Witness() if wrappers else None
        #: The owner without its wrappers.
        self._owner: Final = _manager(owner, ()).hook
        # The last of those that want to be last is the innermost.
        self._hook: Final = _manager(owner, [*wrappers, self._witness]).hook if self._witness else self._owner

    def _call(self, hook: str, doing: str, subject: Any, **arguments: Any) -> Any:
        return _call(self._hook, hook, doing, subject, **arguments)

    def _undoably(self, undo: Undo, hook: str, doing: str, subject: Any, **arguments: Any) -> Any:
        """Call a hook that can be refused; `undo` gets the owner's answer if a wrapper fails the call afterwards."""
        if self._witness is None:
            return self._call(hook, doing, subject, **arguments)
        with self._witness.watch() as answers:
            try:
                result = self._call(hook, doing, subject, **arguments)
            except BaseException:
                if answers:
                    quietly(lambda: undo(answers[0]))
                raise
        if not answers:
            raise MdevError(errno.EIO, f"{subject}: {doing}: a wrapper hid the failure, or did not make the call", subject)
        return result

    def _surely(self, hook: str, doing: str, subject: Any, **arguments: Any) -> None:
        """Call a hook that nobody can refuse: the owner gets a call that its wrappers did not let through without them."""
        if self._witness is None:
            self._call(hook, doing, subject, **arguments)
            return
        with self._witness.watch() as called:
            try:
                self._call(hook, doing, subject, **arguments)
            except BaseException:
                if not called:
                    quietly(lambda: _call(self._owner, hook, doing, subject, **arguments))
                raise
        if not called:
            _call(self._owner, hook, doing, subject, **arguments)


class ParentHooks(_Hooks):
    """A parent driver's hooks, typed; see `ParentSpec`."""

    spec = ParentSpec
    required = ("parent_create", "parent_remove")

    def __init__(self, owner: ParentOps, wrappers: Iterable[object] = ()) -> None:
        super().__init__(owner, wrappers)

    def create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Call `parent_create`."""
        self._undoably(lambda _answer: self.remove(mdev), "parent_create", "create failed", mdev, mdev=mdev, params=params)

    def remove(self, mdev: Mdev) -> None:
        """Call `parent_remove`."""
        self._surely("parent_remove", "remove failed", mdev, mdev=mdev)

    def unregister(self, parent: Parent) -> None:
        """Call `parent_unregister`."""
        self._surely("parent_unregister", "unregister failed", parent, parent=parent)

    def suspend(self, parent: Parent) -> None:
        """Call `parent_suspend`."""
        self._undoably(lambda _answer: self.resume(parent), "parent_suspend", "suspend refused", parent, parent=parent)

    def resume(self, parent: Parent) -> None:
        """Call `parent_resume`."""
        self._surely("parent_resume", "resume failed", parent, parent=parent)


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
        answer = self._call("bus_uevent", "uevent failed", device, device=device)
        with Guard(f"{device}: uevent failed", device):
            return {str(name): str(value) for name, value in dict(answer or {}).items()}

    def probe(self, device: Device, driver: Driver) -> None:
        """Call `bus_probe`."""
        doing = f"bus {self.bus.name}: probe failed"
        self._undoably(lambda _answer: self.remove(device), "bus_probe", doing, device, device=device, driver=driver)

    def remove(self, device: Device) -> None:
        """Call `bus_remove`."""
        self._surely("bus_remove", f"bus {self.bus.name}: remove failed", device, device=device)

    def suspend(self, device: Device) -> None:
        """Call `bus_suspend`."""
        doing = f"bus {self.bus.name}: suspend refused"
        self._undoably(lambda _answer: self.resume(device), "bus_suspend", doing, device, device=device)

    def resume(self, device: Device) -> None:
        """Call `bus_resume`."""
        self._surely("bus_resume", f"bus {self.bus.name}: resume failed", device, device=device)


class DriverHooks(_Hooks):
    """A driver's hooks, typed; see `DriverSpec`."""

    spec = DriverSpec
    required = ("driver_probe", "driver_remove")

    def __init__(self, owner: Driver, wrappers: Iterable[object] = ()) -> None:
        super().__init__(owner, wrappers)
        self.driver: Final = owner

    def probe(self, device: Device) -> Endpoint | None:
        """Call `driver_probe`."""

        def undo(endpoint: Endpoint | None) -> None:
            device.endpoint = endpoint  # where the driver finds it
            try:
                self.remove(device)
            finally:
                device.endpoint = None

        endpoint: Endpoint | None = self._undoably(undo, "driver_probe", self._doing("probe failed"), device, device=device)
        return endpoint

    def remove(self, device: Device) -> None:
        """Call `driver_remove`."""
        self._surely("driver_remove", self._doing("remove failed"), device, device=device)

    def let_go(self, device: Device, timeout: float, force: bool) -> None:
        """Call `driver_let_go`."""
        self._call("driver_let_go", self._doing("busy"), device, device=device, timeout=timeout, force=force)

    def suspend(self, device: Device) -> None:
        """Call `driver_suspend`."""
        doing = self._doing("suspend refused")
        self._undoably(lambda _answer: self.resume(device), "driver_suspend", doing, device, device=device)

    def resume(self, device: Device) -> None:
        """Call `driver_resume`."""
        self._surely("driver_resume", self._doing("resume failed"), device, device=device)

    def _doing(self, what: str) -> str:
        return f"driver {self.driver.name}: {what}"
