"""Drivers, and the endpoints through which they give devices to their users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol


class Endpoint(Protocol):
    """What a bound device offers to the outside: a socket, a netdev. Any thread may ask."""

    def describe(self) -> Mapping[str, str]:
        """Return facts for people and JSON: ``kind``, ``socket`` where there is one, ``client`` (empty when nobody is attached)."""
        ...

    def attach(self, client: str) -> Sequence[str]:
        """Return the command-line arguments `client` ("qemu", "dpdk", "libvirt") needs; EOPNOTSUPP for one that cannot use it."""
        ...


def xml_attribute(text: str) -> str:
    """Return `text` as the value of an XML attribute, quoted as libvirt does."""
    return "'" + text.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&apos;") + "'"


def libvirt_arguments(qemu: Sequence[str]) -> list[str]:
    """Return QEMU's arguments as part of a libvirt domain: for endpoints of a kind that libvirt has no element for."""
    return ["<qemu:commandline>", *(f"  <qemu:arg value={xml_attribute(word)}/>" for word in qemu), "</qemu:commandline>"]


class Driver:
    """Base of a driver. Hooks: `mdevkit.hookspecs.DriverSpec`. One object binds any number of devices."""

    #: Unique on its bus.
    name: ClassVar[str] = ""
    #: Name of the bus it drives devices of.
    bus: ClassVar[str] = ""
    #: What it binds: entries compared with ``Device.match``. Equal to the matches of its entry points.
    id_table: ClassVar[Sequence[str]] = ()
