"""What the service holds, remembered so that a look-up costs the same with one device and with a thousand.

What is remembered is never told ahead of the service: an event only makes us forget what it is about, and what is not remembered
is asked for. So a device that somebody has just created is found, and one that this mount has removed is gone at once; one that
somebody else has removed is gone when the event comes, milliseconds later. Without the event stream nothing is remembered.

Any thread may call. The lock guards the tables and is not held while the service is asked.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import msgspec
from mdevkit.errors import MdevError

from mdevkit_service.schema import Device, Driver, Parent
from mdevkit_service.sysfs import texts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mdevkit_service.sysfs.calls import Calls


class View:
    """The service's parents, devices and drivers as `calls` tells them."""

    def __init__(self, calls: Calls) -> None:
        self._calls: Final = calls
        self._lock: Final = threading.Lock()
        #: Whether the event stream is there to tell what is to be forgotten.
        self._live = False
        self._devices: Final[dict[str, Device]] = {}
        self._parents: dict[str, Parent] | None = None
        #: Bus and name of every driver seen.
        self._drivers: Final[set[tuple[str, str]]] = set()
        #: What was forgotten during each question under way.
        self._asking: Final[list[set[str]]] = []
        #: UUID to IOMMU group and back; a number is a device's own for as long as this process sees the device.
        self._groups: Final[dict[str, int]] = {}
        self._grouped: Final[dict[int, str]] = {}
        self._next_group = 0

    # -- what is remembered ----------------------------------------------------------------------------------------

    def remember(self, live: bool) -> None:
        """Begin to remember, or stop: forget everything."""
        with self._lock:
            self._live = live
            self._devices.clear()
            self._drivers.clear()
            self._parents = None
            for forgotten in self._asking:
                forgotten.add("")

    def forget(self, subject: str) -> None:
        """Forget what an event is about, a device's UUID or a parent's name."""
        with self._lock:
            # A subject that is no device we know may be a parent that is new.
            if self._devices.pop(subject, None) is None and not texts.UUID.fullmatch(subject):
                self._parents = None
            for forgotten in self._asking:
                forgotten.add(subject)

    @contextlib.contextmanager
    def _question(self) -> Iterator[set[str]]:
        """Ask the service: yields what is forgotten meanwhile, where ``""`` stands for everything."""
        forgotten: set[str] = set()
        with self._lock:
            self._asking.append(forgotten)
        try:
            yield forgotten
        finally:
            with self._lock:
                # By identity: sets that are equal are not the same.
                self._asking[:] = [known for known in self._asking if known is not forgotten]

    def _learn(self, devices: Iterable[Device], forgotten: set[str]) -> None:
        with self._lock:
            if not self._live or "" in forgotten:
                return
            for device in devices:
                if device.uuid not in forgotten:
                    self._devices[device.uuid] = device
                if device.driver is not None:
                    self._drivers.add((device.bus, device.driver))

    # -- parents ---------------------------------------------------------------------------------------------------

    def parents(self) -> Mapping[str, Parent]:
        """Return the parents by name. Instance counts and attributes in them are old; see `now`."""
        with self._lock:
            known = self._parents
        if known is not None:
            return known
        with self._question() as forgotten:
            found = {facts["name"]: msgspec.convert(facts, Parent) for facts in self._calls("GET", "/v1/parents")}
        with self._lock:
            if self._live and all(map(texts.UUID.fullmatch, forgotten)):
                self._parents = found
        return found

    def now(self, parent: str) -> Parent:
        """Return a parent as it is at this moment; ENODEV."""
        (facts,) = self._calls("GET", f"/v1/parents?parent={quote(parent, safe='')}")
        return msgspec.convert(facts, Parent)

    def parent_attribute(self, parent: str, name: str, value: str | None = None) -> str:
        """Read an attribute of a parent, or store `value`."""
        return self._attribute(f"/v1/parents/{quote(parent, safe='')}/attributes/{name}", value)

    def type_attribute(self, parent: str, type_id: str, name: str, value: str | None = None) -> str:
        """Read an attribute of a parent's type, or store `value`."""
        return self._attribute(f"/v1/parents/{quote(parent, safe='')}/types/{quote(type_id, safe='')}/attributes/{name}", value)

    # -- devices ---------------------------------------------------------------------------------------------------

    def device(self, uuid: str) -> Device | None:
        """Return a device, None when there is none."""
        with self._lock:
            known = self._devices.get(uuid)
        if known is not None:
            return known
        try:
            with self._question() as forgotten:
                found = self._ask(uuid)
        except MdevError as error:
            if error.errno != errno.ENODEV:
                raise
            return None
        self._learn([found], forgotten)
        return found

    def _ask(self, uuid: str) -> Device:
        """Return a device as it is at this moment; its attributes, each a call of the vendor's, are not asked for. ENODEV."""
        return msgspec.convert(self._calls("GET", f"/v1/devices/{uuid}?attributes=0"), Device)

    def devices(self, parent: str | None = None) -> list[Device]:
        """Return all devices (of a parent) there are at this moment."""
        query = f"?parent={quote(parent, safe='')}" if parent else ""
        with self._lock:
            before = set(self._groups) if parent is None else set()
        with self._question() as forgotten:
            found = msgspec.convert(self._calls("GET", f"/v1/devices{query}"), list[Device])
        self._learn(found, forgotten)
        self._drop_groups(before - {device.uuid for device in found})
        return found

    def create(self, type_id: str, parent: str, uuid: str, bind: bool) -> None:
        """Create a device."""
        self._calls("POST", "/v1/devices", {"type": type_id, "parent": parent, "uuid": uuid, "bind": bind})
        self.forget(uuid)

    def remove(self, uuid: str) -> None:
        """Remove a device."""
        self._calls("DELETE", f"/v1/devices/{uuid}")
        self.forget(uuid)

    def attribute(self, uuid: str, name: str, value: str | None = None) -> str:
        """Read an attribute of a device, or store `value`."""
        return self._attribute(f"/v1/devices/{uuid}/attributes/{name}", value)

    def _attribute(self, path: str, value: str | None) -> str:
        if value is None:
            return str(self._calls("GET", path)["value"])
        self._calls("PUT", path, {"value": value})
        return value

    def driver_override(self, uuid: str) -> str | None:
        """Return the one driver that may bind a device, as it is at this moment."""
        return self._ask(uuid).driver_override

    def set_driver_override(self, uuid: str, driver: str | None) -> None:
        """Let one driver only bind a device, or any."""
        self._calls("POST", f"/v1/devices/{uuid}/driver_override", {"driver": driver})
        self.forget(uuid)

    # -- drivers ---------------------------------------------------------------------------------------------------

    def bind(self, uuid: str, driver: str | None) -> None:
        """Bind a device to a driver, or to whichever will have it."""
        self._calls("POST", f"/v1/devices/{uuid}/bind", {"driver": driver})
        self.forget(uuid)

    def unbind(self, uuid: str) -> None:
        """Take a device from its driver."""
        self._calls("POST", f"/v1/devices/{uuid}/unbind", {})
        self.forget(uuid)

    def has_driver(self, bus: str, name: str) -> bool:
        """Whether a driver is loaded: drivers come with the first device they match, and stay."""
        with self._lock:
            known = (bus, name) in self._drivers
        return known or any(driver.name == name and driver.bus == bus for driver in self.drivers())

    def drivers(self) -> list[Driver]:
        """Return the drivers that are loaded, with the devices they have bound."""
        found = msgspec.convert(self._calls("GET", "/v1/drivers"), list[Driver])
        with self._lock:
            if self._live:
                self._drivers.update((driver.bus, driver.name) for driver in found)
        return found

    # -- IOMMU groups ----------------------------------------------------------------------------------------------

    def group(self, uuid: str) -> int:
        """Return the number of a device's IOMMU group: each device has one of its own, as an mdev in Linux."""
        with self._lock:
            number = self._groups.get(uuid)
            if number is None:
                number = self._groups[uuid] = self._next_group
                self._grouped[number] = uuid
                self._next_group += 1
            return number

    def in_group(self, number: int) -> Device | None:
        """Return the device of an IOMMU group."""
        if number not in self._grouped:
            # One that nobody has looked at yet gets its number now.
            for device in self.devices():
                self.group(device.uuid)
        with self._lock:
            uuid = self._grouped.get(number)
        return self.device(uuid) if uuid is not None else None

    def _drop_groups(self, uuids: set[str]) -> None:
        with self._lock:
            for uuid in uuids & self._groups.keys():
                del self._grouped[self._groups.pop(uuid)]
