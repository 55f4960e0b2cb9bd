"""What a host does for the service, on its registry. Every method may be called from any thread, and returns plain values."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from mdevkit.device import Mdev
from mdevkit.errors import MdevError, wrap
from mdevkit.names import parse_uuid
from mdevkit.parent import check_room

from mdevkit_service.scout import refresh

if TYPE_CHECKING:
    from mdevkit.attributes import Attribute, AttributeTable
    from mdevkit.parent import MdevType, Parent
    from mdevkit.registry import Registry

Facts = dict[str, Any]

CLIENTS: Final = ("qemu", "dpdk", "libvirt")


class HostOps:
    """The operations; `call` finds one by name. `stop` ends the host."""

    def __init__(self, registry: Registry, stop: Callable[[], None]) -> None:
        self._registry: Final = registry
        self._stop: Final = stop
        #: What the service wants to find again when it has lost its own notes: UUID to its record.
        self._notes: Final[dict[str, Any]] = {}
        self._running = 0
        self._lock: Final = threading.Lock()
        self._table: Final[dict[str, Callable[..., Any]]] = {
            "parents": self.parents,
            "devices": self.devices,
            "create": self.create,
            "check": self.check,
            "remove": self.remove,
            "show": self.show,
            "get": self.get,
            "set": self.set,
            "configure": self.configure,
            "get_parent": self.get_parent,
            "set_parent": self.set_parent,
            "get_type": self.get_type,
            "set_type": self.set_type,
            "bind": self.bind,
            "unbind": self.unbind,
            "override": self.override,
            "suspend": self.suspend,
            "resume": self.resume,
            "suspended": self.suspended,
            "counters": self.counters,
            "drivers": self.drivers,
            "refresh": self.refresh,
            "stop": self.stop,
        }

    @property
    def busy(self) -> bool:
        """Whether a request is carried out."""
        return self._running > 0

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Carry out an operation: ENOSYS for one there is not, else what the registry raises."""
        operation = self._table.get(name)
        if operation is None:
            raise MdevError(errno.ENOSYS, f"this host has no operation {name!r}; it is older than the service")
        return operation(**arguments)

    def begin(self) -> None:
        """Take note that a request is carried out, answer and all."""
        with self._lock:
            self._running += 1

    def end(self) -> None:
        """Take note that it is done."""
        with self._lock:
            self._running -= 1

    # -- looking -------------------------------------------------------------------------------------------------------

    def parents(self) -> list[Facts]:
        """Return the parents with their types, instance counts and attributes."""
        return [_parent(parent) for parent in self._registry.parents]

    def devices(self) -> list[Facts]:
        """Return every device, with the service's note about it."""
        return [{**describe(mdev), "note": self._notes.get(mdev.name)} for mdev in self._registry.mdevs]

    def show(self, uuid: str, *, attributes: bool) -> Facts:
        """Return a device, with its attributes if they are wanted: each is a call of the vendor's."""
        mdev = self._registry.get(uuid)
        return describe(mdev) | ({"attributes": mdev.type.device_table.read_all(mdev)} if attributes else {})

    def counters(self) -> dict[str, dict[str, list[int]]]:
        """Return the counters of every device that has some, by UUID; one that cannot be read is left out."""
        found = {mdev.name: dict(_counters(mdev)) for mdev in self._registry.mdevs}
        return {uuid: counters for uuid, counters in found.items() if counters}

    def drivers(self) -> list[Facts]:
        """Return the drivers loaded here, and what they have bound."""
        bound: dict[tuple[str, str | None], list[str]] = {}
        for mdev in self._registry.mdevs:
            bound.setdefault((mdev.bus, mdev.driver), []).append(mdev.name)
        return [
            {"name": driver.name, "bus": driver.bus, "bound": bound.get((driver.bus, driver.name), [])}
            for driver in self._registry.drivers
        ]

    def refresh(self) -> None:
        """Learn of drivers and buses that were installed since."""
        refresh(self._registry.catalog)

    # -- life cycle ----------------------------------------------------------------------------------------------------

    def create(
        self,
        uuid: str,
        type: str,  # noqa: A002  (the word of the protocol)
        parent: str,
        *,
        attributes: dict[str, str],
        settings: list[tuple[str, str]],
        bind: bool,
        driver: str | None,
        driver_override: str | None,
        endpoint: str | None,
        note: Any,
    ) -> Facts:
        """Create a device; with `driver`, bind it to that one by hand. `settings` are stored before, as they once were.

        All or nothing but for settings: one that is refused is noted in the device's error.
        """
        registry = self._registry
        self._notes[uuid] = note
        try:
            mdev = registry.create(
                type,
                uuid=uuid,
                parent=parent,
                params=attributes,
                bind=bind and not driver and not settings,
                driver_override=driver_override,
                endpoint_path=endpoint,
            )
        except MdevError:
            self._notes.pop(uuid, None)
            raise
        errors = [str(error) for name, value in settings if (error := _refusal(mdev, name, value))]
        if bind and (driver or settings):
            self._bind_or_remove(mdev, driver)
        return describe(mdev) | ({"error": "; ".join(errors)} if errors else {})

    def _bind_or_remove(self, mdev: Mdev, driver: str | None) -> None:
        try:
            if driver is None:
                self._registry.attach(mdev.uuid)
            else:
                self._registry.bind(mdev.uuid, driver)
        except MdevError:
            self.remove(mdev.name, force=True, timeout=0.0)
            raise

    def check(self, type: str, parent: str, attributes: dict[str, str]) -> None:  # noqa: A002
        """Raise what a create would, as far as it can be told without creating: parameters, instances."""
        type_ = self._registry.type(type, parent)
        type_.device_table.parameters(attributes, type_)
        check_room(type_.costs, type_)

    def remove(self, uuid: str, *, force: bool, timeout: float | None) -> None:
        """Remove a device."""
        self._registry.remove(uuid, force=force, timeout=timeout)
        self._notes.pop(str(parse_uuid(uuid)), None)

    def stop(self) -> None:
        """End the host, devices and all."""
        self._stop()

    # -- attributes ----------------------------------------------------------------------------------------------------

    def get(self, uuid: str, name: str) -> str:
        """Return the text of a device's attribute."""
        mdev = self._registry.get(uuid)
        return _text(mdev.type.device_table, name, mdev)

    def set(self, uuid: str, values: dict[str, str]) -> dict[str, str]:
        """Store several attributes, all or none; returns those whose value a new device must be given again."""
        mdev = self._registry.get(uuid)
        table = mdev.type.device_table
        _check_all(table, values, mdev)
        before: dict[str, str] = {}
        for name, value in values.items():
            try:
                if table[name].show is not None:
                    before[name] = _text(table, name, mdev)
                mdev.set_attribute(name, value)
            except MdevError:
                _restore(mdev, {known: before[known] for known in reversed(before) if known != name})
                raise
        kept = {name: value for name, value in values.items() if table[name].show is not None}
        self._note(mdev, settings={**(self._notes.get(mdev.name) or {}).get("settings", {}), **kept})
        return kept

    def configure(self, uuid: str, name: str, value: str) -> None:
        """Store an attribute on behalf of the device's definition."""
        mdev = self._registry.get(uuid)
        mdev.set_attribute(name, value)
        self._note(mdev, configured=[*(self._notes.get(mdev.name) or {}).get("configured", []), (name, value)])

    def _note(self, mdev: Mdev, **changes: Any) -> None:
        """Keep the service's note about a device true, for a service that dies before it can."""
        note = self._notes.get(mdev.name)
        if isinstance(note, dict):
            self._notes[mdev.name] = {**note, **changes}

    def get_parent(self, parent: str, name: str) -> str:
        """Return the text of a parent's attribute."""
        found = self._registry.parent(parent)
        return _text(found.table, name, found)

    def set_parent(self, parent: str, name: str, value: str) -> None:
        """Store an attribute of a parent."""
        self._registry.parent(parent).set_attribute(name, value)

    def get_type(self, parent: str, type: str, name: str) -> str:  # noqa: A002
        """Return the text of an attribute of a parent's type."""
        found = self._registry.type(type, parent)
        return _text(found.table, name, found)

    def set_type(self, parent: str, type: str, name: str, value: str) -> None:  # noqa: A002
        """Store an attribute of a parent's type."""
        found = self._registry.type(type, parent)
        found.table.write(name, value, found)

    # -- drivers -------------------------------------------------------------------------------------------------------

    def bind(self, uuid: str, *, driver: str | None, override: bool) -> Facts:
        """Bind a device to a driver, or to whichever will have it."""
        if driver is None:
            self._registry.attach(uuid)
        else:
            self._registry.bind(uuid, driver, override=override)
        mdev = self._registry.get(uuid)
        self._note(mdev, bind=True, driver=driver, driver_override=mdev.driver_override)
        return describe(mdev)

    def unbind(self, uuid: str, *, force: bool, timeout: float | None) -> Facts:
        """Take a device from its driver."""
        self._registry.unbind(uuid, force=force, timeout=timeout)
        mdev = self._registry.get(uuid)
        self._note(mdev, bind=False, driver=None)
        return describe(mdev)

    def suspend(self, uuid: str | None = None, parent: str | None = None) -> None:
        """Suspend a device, a parent with its devices, or everything here."""
        self._registry.suspend(uuid or parent)

    def resume(self, uuid: str | None = None, parent: str | None = None) -> None:
        """Resume what `suspend` has suspended."""
        self._registry.resume(uuid or parent)

    def suspended(self) -> list[str]:
        """Return the devices and parents that are suspended."""
        devices = [mdev.name for mdev in self._registry.mdevs if mdev.suspended]
        return devices + [parent.name for parent in self._registry.parents if parent.suspended]

    def override(self, uuid: str, *, driver: str | None) -> Facts:
        """Set or clear the driver_override."""
        self._registry.set_driver_override(uuid, driver)
        mdev = self._registry.get(uuid)
        self._note(mdev, driver_override=mdev.driver_override)
        return describe(mdev)


def describe(mdev: Mdev) -> Facts:
    """Return what others may know of a device. A driver that cannot say what it offers is told of in ``error``."""
    facts = {
        "uuid": mdev.name,
        "parent": mdev.parent.name,
        "type": mdev.type.id,
        "bus": mdev.bus,
        "device_api": mdev.type.device_api,
        "state": str(mdev.state),
        "suspended": mdev.suspended,
        "driver": mdev.driver,
        "driver_override": mdev.driver_override,
        "modalias": mdev.modalias,
        "error": str(mdev.error) if mdev.error else None,
    }
    try:
        return facts | _endpoint(mdev)
    except Exception as error:  # noqa: BLE001  (a driver's bug is reported, and hides no device)
        return facts | {"error": str(wrap(error, f"{mdev}: endpoint"))}


def _endpoint(mdev: Mdev) -> Facts:
    endpoint = mdev.endpoint
    if endpoint is None:
        return {}
    attach = {}
    for client in CLIENTS:
        try:
            attach[client] = list(endpoint.attach(client))
        except MdevError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
    return {"endpoint": dict(endpoint.describe()), "attach": attach}


def _counters(mdev: Mdev) -> Iterator[tuple[str, list[int]]]:
    table = mdev.type.device_table
    for name, attribute in table.items():
        if attribute.counter:
            with contextlib.suppress(MdevError, ValueError):  # a vendor's bug, or a device that goes at this moment
                yield name, [int(number) for number in _text(table, name, mdev).split()]


def _parent(parent: Parent) -> Facts:
    return {
        "name": parent.name,
        "driver": parent.driver_name,
        "host": parent.host_key,
        "suspended": parent.suspended,
        "types": [_type(type_) for type_ in parent.types.values()],
        "attributes": parent.table.read_all(parent),
        "attribute_info": _infos(parent.table),
    }


def _type(type_: MdevType) -> Facts:
    return {
        "id": type_.id,
        "name": type_.name,
        "description": type_.description,
        "device_api": type_.device_api,
        "bus": type_.bus,
        "available_instances": type_.available_instances,
        "attributes": type_.table.read_all(type_),
        "attribute_info": _infos(type_.table),
        "device_attributes": _infos(type_.device_table),
    }


def _infos(table: AttributeTable) -> list[Facts]:
    return [_info(attribute) for attribute in table.values()]


def _info(attribute: Attribute[Any]) -> Facts:
    default = attribute.default
    return {
        "name": attribute.name,
        "kind": type(attribute.kind).__name__.lower(),
        "doc": attribute.doc,
        "mode": attribute.mode,
        "create": attribute.create,
        "counter": attribute.counter,
        "default": None if default is None else attribute.kind.format(default),
    }


def _text(table: AttributeTable, name: str, subject: Any) -> str:
    return table.find(name, subject).kind.format(table.read(name, subject))


def _check_all(table: AttributeTable, values: Mapping[str, str], subject: Any) -> None:
    """Find what can be found wrong before anything is stored."""
    for name, value in values.items():
        attribute = table.find(name, subject)
        if attribute.store is None:
            raise MdevError(errno.EACCES, f"attribute {name} of {subject} is read-only", subject)
        attribute.parse(value, subject)


def _refusal(mdev: Mdev, name: str, value: str) -> MdevError | None:
    """Store a value and return why it was refused, if it was."""
    try:
        mdev.set_attribute(name, value)
    except MdevError as error:
        return error
    return None


def _restore(mdev: Mdev, values: Mapping[str, str]) -> None:
    """Put values back; one that is refused stays as it is, since the first error is the one to tell."""
    for name, value in values.items():
        _refusal(mdev, name, value)
