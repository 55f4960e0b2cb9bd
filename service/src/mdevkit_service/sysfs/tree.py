"""The whole tree: buses, classes, devices, IOMMU groups; and the way from a path to what is there.

A path is walked from the root, a child at a time, over what `View` remembers; nothing is built but the nodes on the way. Any
thread may call.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError

from mdevkit_service.sysfs import texts
from mdevkit_service.sysfs.buses import BusesFolder
from mdevkit_service.sysfs.nodes import Fixed, Folder, Link, Listing, Node
from mdevkit_service.sysfs.parents import ParentFolder
from mdevkit_service.sysfs.places import Places

if TYPE_CHECKING:
    from mdevkit_service.schema import Device, Parent, Type
    from mdevkit_service.sysfs.places import Pci
    from mdevkit_service.sysfs.view import View

#: The bus and, with ``_bus``, the class under which tools look for every parent and every device.
COMMON: Final = "mdev"

_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,9}")

#: Tells that something was asked for by ``uevent``: path, bus or class, action, further variables.
Announce = Callable[[str, str, str, dict[str, str]], None]


class System:
    """What all folders share.

    With `announce` libudev's listeners are told of devices, and each device says it is on the bus those know.
    """

    def __init__(self, view: View, pci: Iterable[Pci] = (), announce: Announce | None = None) -> None:
        self.view: Final = view
        self.places: Final = Places(view, {looks.parent: looks for looks in pci})
        #: Buses whose new devices are left unbound (``drivers_autoprobe``).
        self.unprobed: Final[set[str]] = set()
        self._announce: Final = announce

    def device(self, name: str) -> Device | None:
        """Return the device of that UUID, if it has a place in the tree."""
        if not texts.UUID.fullmatch(name):
            return None
        device = self.view.device(name)
        return device if device is not None and device.parent in self.view.parents() else None

    def devices(self) -> list[Device]:
        """Return all devices that have a place in the tree."""
        parents = self.view.parents()
        return [device for device in self.view.devices() if device.parent in parents]

    def buses(self) -> list[str]:
        """Return the names of all buses: tools expect the common one even with nothing on it."""
        types = (type_.bus for parent in self.view.parents().values() for type_ in parent.types)
        return list(dict.fromkeys([COMMON, *types]))

    def subsystem(self, device: Device) -> str:
        """Return the bus a device says it is on."""
        return COMMON if self._announce else device.bus

    def create(self, parent: str, type_: Type, uuid: str) -> None:
        """Create a device, as ``create`` does."""
        self.view.create(type_.id, parent, uuid, bind=type_.bus not in self.unprobed)

    def announce(self, device: Device, action: str, variables: dict[str, str] | None = None) -> None:
        """Tell listeners of a device."""
        path = self.places.device(device)
        if self._announce and path:
            known = {"DRIVER": device.driver, "MODALIAS": device.modalias}
            told = variables or {name: value for name, value in known.items() if value}
            self._announce(path, self.subsystem(device), action, told)

    def announce_parent(self, parent: Parent, action: str) -> None:
        """Tell listeners of a parent."""
        if self._announce:
            subsystem = "pci" if parent.name in self.places.pci else parent.driver
            self._announce(self.places.folder(parent), subsystem, action, {})


class Tree:
    """The tree."""

    def __init__(self, system: System) -> None:
        self._system: Final = system
        self._view: Final = system.view
        self._root: Final = Fixed(
            {
                "bus": BusesFolder(system),
                "class": Listing(self._class, self._classes),
                "devices": Listing(self._top, self._tops),
                "kernel": Fixed({"iommu_groups": Listing(self._group, self._groups)}),
            }
        )

    def find(self, path: str) -> Node:
        """Return what is at an absolute path; ENOENT, ENOTDIR."""
        node: Node = self._root
        for name in path.split("/"):
            if not name:
                continue
            if not isinstance(node, Folder):
                raise MdevError(errno.ENOTDIR, f"{path}: not a folder before {name}", path)
            child = node.child(name)
            if child is None:
                raise MdevError(errno.ENOENT, f"there is no {path}", path)
            node = child
        return node

    # -- class -----------------------------------------------------------------------------------------------------

    def _classes(self) -> list[str]:
        drivers = (parent.driver for parent in self._view.parents().values() if parent.name not in self._system.places.pci)
        return list(dict.fromkeys([*(f"{bus}_bus" for bus in self._system.buses()), *drivers]))

    def _class(self, name: str) -> Node | None:
        """Return ``class/BUS_bus``, the compatibility class of a bus, or the class of a parent's driver."""
        bus = name.removesuffix("_bus")
        if name.endswith("_bus") and bus in self._system.buses():
            return self._links(lambda parent: bus == COMMON or any(type_.bus == bus for type_ in parent.types))
        if name in self._classes():
            return self._links(lambda parent: parent.driver == name and parent.name not in self._system.places.pci)
        return None

    def _links(self, belongs: Callable[[Parent], bool]) -> Folder:
        """Return a folder of links to those parents that belong there."""
        places = self._system.places

        def find(name: str) -> Node | None:
            parent = places.parent(name)
            return Link(places.folder(parent)) if parent and belongs(parent) else None

        return Listing(find, lambda: [places.name(parent.name) for parent in self._view.parents().values() if belongs(parent)])

    # -- devices ---------------------------------------------------------------------------------------------------

    def _tops(self) -> list[str]:
        bridges = dict.fromkeys(f"pci{looks.bus}" for looks in self._present())
        return ["virtual", *bridges]

    def _present(self) -> list[Pci]:
        parents = self._view.parents()
        return [looks for looks in self._system.places.pci.values() if looks.parent in parents]

    def _top(self, name: str) -> Node | None:
        if name == "virtual":
            return Listing(self._virtual, self._virtuals)
        here = [looks.address for looks in self._present() if f"pci{looks.bus}" == name]
        return Listing(lambda child: self._parent(child) if child in here else None, lambda: here) if here else None

    def _virtuals(self) -> list[str]:
        return [name for name in self._classes() if any(self._of_driver(name))]

    def _virtual(self, driver: str) -> Node | None:
        names = self._of_driver(driver)
        return Listing(lambda child: self._parent(child) if child in names else None, lambda: names) if names else None

    def _of_driver(self, driver: str) -> list[str]:
        pci = self._system.places.pci
        return [parent.name for parent in self._view.parents().values() if parent.driver == driver and parent.name not in pci]

    def _parent(self, name: str) -> Node | None:
        parent = self._system.places.parent(name)
        return ParentFolder(self._system, parent) if parent else None

    # -- kernel/iommu_groups ---------------------------------------------------------------------------------------

    def _groups(self) -> list[str]:
        return [str(self._view.group(device.uuid)) for device in self._system.devices()]

    def _group(self, name: str) -> Node | None:
        device = self._view.in_group(int(name)) if _NUMBER.fullmatch(name) else None
        path = self._system.places.device(device) if device else None
        return Fixed({"devices": Fixed({device.uuid: Link(path)})}) if device and path else None
