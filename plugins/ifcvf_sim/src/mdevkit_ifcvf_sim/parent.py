"""The parents: the virtual functions of one simulated card, each with one device at a time.

They share the card, and so a host (`host_key`). How many there are says the environment variable MDEVKIT_IFCVF_FUNCTIONS. Hooks are
called on any thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from mdevkit.attributes import Attribute, Choice, Text
from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl
from mdevkit.parent import MdevType, ParentOps, Pool
from mdevkit_vfio.bus import VfioMdev
from mdevkit_virtio.address import Mac, mac_bytes
from mdevkit_virtio.bus import ClassId, VirtioMdev

from mdevkit_ifcvf_sim.card import LOOPBACK, SWITCH, Card

if TYPE_CHECKING:
    from mdevkit.device import Mdev
    from mdevkit.parent import MdevType as Type

    from mdevkit_ifcvf_sim.driver import IfcvfOps
    from mdevkit_ifcvf_sim.pci import PciFunction

VARIABLE: Final = "MDEVKIT_IFCVF_FUNCTIONS"
DEFAULT_FUNCTIONS: Final = 4
MOST_FUNCTIONS: Final = 64

#: Group to bus, device API and name.
_KINDS: Final = {
    "virtio_mdev": ("mdev_virtio", "virtio_mdev", "IFC VF virtio accelerator (virtio ring compatible)"),
    "vhost_mdev": ("mdev_virtio", "vhost_mdev", "IFC VF vhost accelerator (virtio ring compatible)"),
    "vfio_pci": ("mdev", "vfio-pci", "IFC VF as a whole, for a guest's own virtio driver"),
}
_CLASSES: Final = {"virtio_mdev": ClassId.VIRTIO, "vhost_mdev": ClassId.VHOST}


class IfcvfParent(ParentOps):
    """One virtual function; see the README for types and attributes."""

    driver_name = "ifcvf"
    host_key = "ifcvf"

    def __init__(self, card: Card, number: int) -> None:
        self.name = f"0000:1a:{number // 8:02x}.{number % 8}"
        self.card: Final = card
        #: One device at a time, of whatever type.
        self.slot: Final = Pool("functions", 1)
        self.types = tuple(self._type(group) for group in _KINDS)
        self.attributes = (
            Attribute(
                "forwarding",
                Choice((LOOPBACK, SWITCH)),
                "What the whole card does with frames: each function's back to it, or between functions by address.",
                show=lambda _parent: card.forwarding,
                store=lambda _parent, value: card.set_forwarding(value),
            ),
        )

    def _type(self, group: str) -> MdevType:
        bus, device_api, name = _KINDS[group]
        return MdevType(
            group=group,
            bus=bus,
            device_api=device_api,
            name=name,
            costs={self.slot: 1},
            attributes=(Attribute("type", Text(), "Kind of device.", show=_kind),),
            device_attributes=(_MAC,),
        )

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Put the function into use, and give it to a guest whole or through the parent driver."""
        # Imported here: whoever only lists types needs no device model.
        from mdevkit_ifcvf_sim.pci import PciFunction

        rings = self.card.add(mac_bytes(params["mac"], mdev.uuid), f"ifcvf {mdev.uuid}")
        try:
            function = PciFunction(rings, f"ifcvf {mdev.uuid}")
            try:
                ops = _give(function, mdev)
            except BaseException:
                function.close()
                raise
        except BaseException:
            self.card.remove(rings)
            raise
        mdev.drvdata = (rings, function, ops)

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """Take the function out of use."""
        rings, function, ops = mdev.drvdata
        if ops is not None:
            ops.close()
        function.close()
        self.card.remove(rings)


def _give(function: PciFunction, mdev: Mdev) -> IfcvfOps | None:
    """Give the function to the class of the device; return the parent driver's ops, if it is between the two."""
    from mdevkit_ifcvf_sim.driver import IfcvfOps
    from mdevkit_ifcvf_sim.pci import HostAccess

    if mdev.type.group in _CLASSES:
        ops = IfcvfOps(HostAccess(function))
        VirtioMdev.from_device(mdev).set_ops(_CLASSES[mdev.type.group], ops)
        return ops
    VfioMdev.from_device(mdev).set_ops(function)
    return None


def _kind(type_: Type) -> str:
    del type_
    return "net"


def _show_mac(mdev: Mdev) -> str:
    rings, *_ = mdev.drvdata
    mac: bytes = rings.config.get_bytes("mac")
    return mac.hex(":")


_MAC: Final = Attribute(
    "mac",
    Mac(),
    "Ethernet address; by default one made from the UUID.",
    show=_show_mac,
    create=True,
    default="",
)


def functions(environment: Mapping[str, str] = os.environ) -> Sequence[IfcvfParent]:
    """Make the card and return its functions (the entry point): EINVAL for a number of functions that cannot be."""
    text = environment.get(VARIABLE, str(DEFAULT_FUNCTIONS))
    if not text.isdecimal() or not 1 <= int(text) <= MOST_FUNCTIONS:
        raise MdevError(errno.EINVAL, f"{VARIABLE}={text}: a card has 1 to {MOST_FUNCTIONS} functions")
    card = Card()
    return [IfcvfParent(card, number) for number in range(int(text))]
