"""A parent's folder: its types, its devices and its attributes; and how it looks on a PCI bus, if it is to."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from mdevkit_service.sysfs import attributes, texts
from mdevkit_service.sysfs.devices import DeviceFolder, power, uevent
from mdevkit_service.sysfs.nodes import Binary, File, Folder, Link, Listing, Node, text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mdevkit_service.schema import Parent, Type
    from mdevkit_service.sysfs.places import Pci
    from mdevkit_service.sysfs.tree import System

TYPES: Final = "mdev_supported_types"

#: Processing accelerator, programming interface 0 (PCI Code and ID Assignment, base class 12h).
_PCI_CLASS: Final = 0x120000


class ParentFolder(Folder):
    """``devices/virtual/DRIVER/PARENT`` or ``devices/pciDDDD:BB/ADDRESS``."""

    def __init__(self, system: System, parent: Parent) -> None:
        self._system: Final = system
        self._parent: Final = parent
        looks = system.places.pci.get(parent.name)
        self._own: Final = _pci_nodes(parent, looks, system) if looks else _class_nodes(parent, system)

    def child(self, name: str) -> Node | None:
        """See `Folder`."""
        if name == TYPES:
            return TypesFolder(self._system, self._parent)
        node = self._own.get(name) or attributes.find(self._parent.attribute_info, self._access, name)
        return node or self._device(name)

    def _device(self, name: str) -> Node | None:
        device = self._system.device(name)
        return DeviceFolder(self._system, device) if device and device.parent == self._parent.name else None

    def names(self) -> Iterator[str]:
        """See `Folder`."""
        own = dict.fromkeys([TYPES, *self._own, *attributes.names(self._parent.attribute_info)])
        yield from own
        yield from (device.uuid for device in self._system.view.devices(self._parent.name))

    def _access(self, name: str, value: str | None) -> str:
        return self._system.view.parent_attribute(self._parent.name, name, value)


class TypesFolder(Folder):
    """``mdev_supported_types``."""

    def __init__(self, system: System, parent: Parent) -> None:
        self._system: Final = system
        self._parent: Final = parent

    def child(self, name: str) -> Node | None:
        """See `Folder`."""
        found = next((type_ for type_ in self._parent.types if type_.id == name), None)
        return TypeFolder(self._system, self._parent, found) if found else None

    def names(self) -> list[str]:
        """See `Folder`."""
        return [type_.id for type_ in self._parent.types]


class TypeFolder(Folder):
    """``mdev_supported_types/TYPE``."""

    def __init__(self, system: System, parent: Parent, type_: Type) -> None:
        self._system: Final = system
        self._parent: Final = parent
        self._type: Final = type_

    def child(self, name: str) -> Node | None:
        """See `Folder`."""
        if name == "create":
            return File(store=self._create)
        if name == "available_instances":
            return File(lambda: str(self._now().available_instances))
        if name == "devices":
            return Listing(self._device, self._devices)
        if name in {"device_api", "name", "description"}:
            value = getattr(self._type, name)
            return text(value) if value else None
        return attributes.find(self._type.attribute_info, self._access, name)

    def names(self) -> list[str]:
        """See `Folder`."""
        told = [name for name in ("name", "description", "device_api") if getattr(self._type, name)]
        vendors = attributes.names(self._type.attribute_info)
        return list(dict.fromkeys(["create", "available_instances", "devices", *told, *vendors]))

    def _create(self, data: bytes) -> None:
        self._system.create(self._parent.name, self._type, texts.uuid(data))

    def _now(self) -> Type:
        types = self._system.view.now(self._parent.name).types
        return next((type_ for type_ in types if type_.id == self._type.id), self._type)

    def _access(self, name: str, value: str | None) -> str:
        return self._system.view.type_attribute(self._parent.name, self._type.id, name, value)

    def _device(self, name: str) -> Node | None:
        device = self._system.device(name)
        if device is None or (device.parent, device.type) != (self._parent.name, self._type.id):
            return None
        return Link(f"{self._system.places.folder(self._parent)}/{device.uuid}")

    def _devices(self) -> Iterable[str]:
        return (device.uuid for device in self._system.view.devices(self._parent.name) if device.type == self._type.id)


# -- what the driver core and the PCI core add -----------------------------------------------------------------------------


def _class_nodes(parent: Parent, system: System) -> dict[str, Node]:
    """Return the files of a device of a class, as the kernel's own sample parents are."""
    return {
        "subsystem": Link(f"/class/{parent.driver}"),
        "uevent": uevent(list, lambda action: system.announce_parent(parent, action)),
        "power": power(),
    }


def _pci_nodes(parent: Parent, looks: Pci, system: System) -> dict[str, Node]:
    """Return the files of a PCI function with no memory, no interrupt and no capabilities."""
    ids = {"vendor": looks.vendor, "device": looks.device, "subsystem_vendor": looks.vendor, "subsystem_device": looks.device}
    variables = pci_variables(parent, looks)
    files: dict[str, Node] = {name: text(f"{value:#06x}") for name, value in ids.items()}
    return files | {
        "class": text(f"{_PCI_CLASS:#08x}"),
        "revision": text("0x00"),
        "irq": text("0"),
        "numa_node": text("-1"),
        "enable": text("1"),
        "modalias": text(variables["MODALIAS"]),
        # Six BARs, the ROM, and six windows of a bridge: start, end, flags.
        "resource": text("\n".join(["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * 13)),
        "config": Binary(data=pci_config(looks)),
        "driver": Link(f"/bus/pci/drivers/{parent.driver}"),
        "subsystem": Link("/bus/pci"),
        "uevent": uevent(
            lambda: [f"{name}={value}" for name, value in variables.items()], lambda action: system.announce_parent(parent, action)
        ),
        "power": power(),
    }


def pci_variables(parent: Parent, looks: Pci) -> dict[str, str]:
    """Return the event variables of a PCI function (drivers/pci/pci-driver.c, pci_uevent)."""
    vendor, device, code = looks.vendor, looks.device, f"{_PCI_CLASS:06X}"
    alias = f"v{vendor:08X}d{device:08X}sv{vendor:08X}sd{device:08X}bc{code[:2]}sc{code[2:4]}i{code[4:]}"
    return {
        "DRIVER": parent.driver,
        "PCI_CLASS": f"{_PCI_CLASS:X}",
        "PCI_ID": f"{vendor:04X}:{device:04X}",
        "PCI_SUBSYS_ID": f"{vendor:04X}:{device:04X}",
        "PCI_SLOT_NAME": looks.address,
        "MODALIAS": f"pci:{alias}",
    }


def pci_config(looks: Pci) -> bytes:
    """Return the configuration space of a function: a type 0 header (PCI 3.0, 6.1) and nothing else."""
    head = struct.pack("<HHHHI", looks.vendor, looks.device, 0, 0, _PCI_CLASS << 8)
    return (head.ljust(0x2C, b"\0") + struct.pack("<HH", looks.vendor, looks.device)).ljust(256, b"\0")
