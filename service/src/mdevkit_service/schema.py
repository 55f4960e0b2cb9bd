"""What the control API takes and gives. The OpenAPI document is made of these."""

from __future__ import annotations

import msgspec


class Version(msgspec.Struct):
    """Who answers."""

    version: str
    #: Version of this interface.
    api: int
    pid: int
    #: Folder of sockets and records.
    runtime: str
    #: Root of the definitions.
    definitions: str


class AttributeInfo(msgspec.Struct):
    """An attribute's declaration."""

    name: str
    #: int, bool, choice, text.
    kind: str
    doc: str
    #: r, w, rw, or c for one that can be given at creation only.
    mode: str
    #: Whether it can be given at creation.
    create: bool
    default: str | None = None
    #: Whether its numbers only grow, so that the difference of two looks is a rate.
    counter: bool = False


class Type(msgspec.Struct):
    """A kind of device a parent can create."""

    id: str
    name: str
    description: str
    device_api: str
    bus: str
    available_instances: int
    attributes: dict[str, str]
    attribute_info: list[AttributeInfo]
    device_attributes: list[AttributeInfo]


class Parent(msgspec.Struct):
    """A device that can be divided."""

    name: str
    driver: str
    #: Key of the host process it lives in.
    host: str
    types: list[Type]
    attributes: dict[str, str]
    attribute_info: list[AttributeInfo]
    suspended: bool = False
    #: Why it cannot be used at the moment.
    error: str | None = None


class Device(msgspec.Struct):
    """A mediated device."""

    uuid: str
    parent: str
    type: str
    bus: str
    device_api: str
    #: creating, unbound, probing, bound, unbinding, deferred, removing; failed when its host has died or cannot make it again.
    state: str
    #: Quiesced until it is resumed; the state is the one it goes on in.
    suspended: bool = False
    driver: str | None = None
    driver_override: str | None = None
    modalias: str = ""
    error: str | None = None
    #: A label: whoever made it, or whom it is for.
    owner: str | None = None
    #: What a bound device offers: ``kind``, ``socket`` where there is one, ``client`` (empty when nobody is attached).
    endpoint: dict[str, str] | None = None
    #: Client (qemu, dpdk, libvirt) to the arguments it needs.
    attach: dict[str, list[str]] = {}


class DeviceDetail(Device):
    """A device with its attributes."""

    attributes: dict[str, str] = {}


class Create(msgspec.Struct, forbid_unknown_fields=True):
    """A device that is wanted."""

    type: str
    #: Any that has room, by default.
    parent: str | None = None
    #: Made up by default.
    uuid: str | None = None
    attributes: dict[str, str] = {}
    #: Whether a driver must take it; else it stays unbound.
    bind: bool = True
    driver_override: str | None = None
    #: Path of the endpoint's socket.
    socket: str | None = None
    owner: str | None = None
    #: Only tell whether it could be made, and where.
    dry_run: bool = False


class Value(msgspec.Struct, forbid_unknown_fields=True):
    """An attribute's text."""

    value: str


class Attributes(msgspec.Struct, forbid_unknown_fields=True):
    """Several attributes, stored all or none."""

    attributes: dict[str, str]


class Bind(msgspec.Struct, forbid_unknown_fields=True):
    """Which driver to bind to; by default whichever matches."""

    driver: str | None = None
    #: Set driver_override, so that the driver need not match.
    override: bool = False


class Unbind(msgspec.Struct, forbid_unknown_fields=True):
    """How to unbind."""

    #: Close the connection of whoever uses it.
    force: bool = False
    #: Seconds a user of the device gets to let go.
    timeout: float | None = None


class DriverOverride(msgspec.Struct, forbid_unknown_fields=True):
    """The one driver that may bind; null for those that match."""

    driver: str | None


class Power(msgspec.Struct, forbid_unknown_fields=True):
    """What to suspend or resume: a device, a parent with its devices, or everything."""

    device: str | None = None
    parent: str | None = None


class HostInfo(msgspec.Struct):
    """A host process."""

    key: str
    pid: int | None
    #: starting, running, failed.
    state: str
    restarts: int
    parents: list[str]
    error: str | None = None
    #: Seconds of processor time, and bytes of memory.
    cpu: float = 0.0
    memory: int = 0


class Driver(msgspec.Struct):
    """A driver loaded in some host, and what it has bound."""

    name: str
    bus: str
    bound: list[str]


class Shutdown(msgspec.Struct, forbid_unknown_fields=True):
    """How the service ends. Devices go on with their hosts unless they are to be removed."""

    remove_devices: bool = False
    #: Remove devices in use too.
    force: bool = False


class Problem(msgspec.Struct):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errno: str
