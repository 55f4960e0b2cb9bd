"""The operations of the control API: a table of paths, and a handler for each. The OpenAPI document is made of the same table.

A handler gets the service, the request and the decoded body, and returns what is to be encoded. It raises `MdevError` for
everything a client can cause.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError

from mdevkit_service import power
from mdevkit_service.schema import (
    Attributes,
    Bind,
    Create,
    Device,
    DeviceDetail,
    Driver,
    DriverOverride,
    HostInfo,
    Parent,
    Power,
    Shutdown,
    Unbind,
    Value,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from mdevkit_service.records import Peer
    from mdevkit_service.service import Service

Handler = Callable[["Service", "Request", Any], Awaitable[Any]]


@dataclass(frozen=True)
class Query:
    """A parameter in the query."""

    name: str
    #: boolean, integer, number, string.
    type: str
    doc: str


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    handler: Handler
    #: Type of the body, and of the answer; None for none.
    takes: Any = None
    gives: Any = None
    query: tuple[Query, ...] = ()
    status: int = 200
    #: Lines of JSON as they come, instead of one value.
    stream: bool = False
    #: Whether it has to wait for the hosts to be found.
    needs_hosts: bool = True


# -- what handlers read of a request ---------------------------------------------------------------------------------------


def peer(request: Request) -> Peer:
    """Return who is at the other end."""
    found: Peer = request.scope["state"]["peer"]
    return found


def flag(request: Request, name: str, default: str = "0") -> bool:
    """Return a yes or no of the query; EINVAL for something else."""
    text = request.query_params.get(name, default).lower()
    if text not in {"0", "1", "true", "false"}:
        raise MdevError(errno.EINVAL, f"{name} is 1 or 0, not {text!r}")
    return text in {"1", "true"}


def number(request: Request, name: str, kind: Callable[[str], Any] = float) -> Any:
    """Return a number of the query that is not negative, None when it is not given; EINVAL."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise MdevError(errno.EINVAL, f"{name} is a number from 0 on, not {text!r}")
    return value


# -- handlers --------------------------------------------------------------------------------------------------------------


async def version(service: Service, _request: Request, _body: None) -> Version:
    """Tell who answers."""
    return service.version()


async def parents(service: Service, request: Request, _body: None) -> list[Parent]:
    """List parents."""
    return await service.hosts.parents(request.query_params.get("parent"))


async def get_parent_attribute(service: Service, request: Request, _body: None) -> Value:
    """Read an attribute of a parent."""
    parent, name = request.path_params["parent"], request.path_params["name"]
    return Value(await service.hosts.call_parent(parent, "get_parent", name=name))


async def set_parent_attribute(service: Service, request: Request, body: Value) -> None:
    """Store an attribute of a parent."""
    parent, name = request.path_params["parent"], request.path_params["name"]
    await service.devices.run(service.hosts.call_parent(parent, "set_parent", name=name, value=body.value))


async def get_type_attribute(service: Service, request: Request, _body: None) -> Value:
    """Read an attribute of a type."""
    path = request.path_params
    return Value(await service.hosts.call_parent(path["parent"], "get_type", type=path["type"], name=path["name"]))


async def set_type_attribute(service: Service, request: Request, body: Value) -> None:
    """Store an attribute of a type."""
    path = request.path_params
    arguments = {"type": path["type"], "name": path["name"], "value": body.value}
    await service.devices.run(service.hosts.call_parent(path["parent"], "set_type", **arguments))


async def devices(service: Service, request: Request, _body: None) -> list[Device]:
    """List devices."""
    return await service.devices.every(request.query_params.get("parent"))


async def create(service: Service, request: Request, body: Create) -> Device:
    """Create a device."""
    return await service.devices.run(service.devices.create(body, peer(request)))


async def device(service: Service, request: Request, _body: None) -> DeviceDetail:
    """Show a device."""
    return await service.devices.get(request.path_params["uuid"], attributes=flag(request, "attributes", "1"))


async def remove(service: Service, request: Request, _body: None) -> None:
    """Remove a device."""
    force, timeout = flag(request, "force"), number(request, "timeout")
    await service.devices.run(service.devices.remove(request.path_params["uuid"], force=force, timeout=timeout))


async def get_attribute(service: Service, request: Request, _body: None) -> Value:
    """Read an attribute."""
    return Value(await service.devices.read(request.path_params["uuid"], "get", name=request.path_params["name"]))


async def set_attribute(service: Service, request: Request, body: Value) -> None:
    """Store an attribute."""
    values = {request.path_params["name"]: body.value}
    await service.devices.run(service.devices.set_attributes(request.path_params["uuid"], values, peer(request)))


async def set_attributes(service: Service, request: Request, body: Attributes) -> None:
    """Store several attributes."""
    await service.devices.run(service.devices.set_attributes(request.path_params["uuid"], body.attributes, peer(request)))


async def bind(service: Service, request: Request, body: Bind) -> Device:
    """Bind a device."""
    if body.override and not body.driver:
        raise MdevError(errno.EINVAL, "override needs a driver")
    uuid = request.path_params["uuid"]
    return await service.devices.run(service.devices.bind(uuid, body.driver, body.override))


async def unbind(service: Service, request: Request, body: Unbind) -> Device:
    """Unbind a device."""
    return await service.devices.run(service.devices.unbind(request.path_params["uuid"], body.force, body.timeout))


async def driver_override(service: Service, request: Request, body: DriverOverride) -> Device:
    """Set or clear driver_override."""
    return await service.devices.run(service.devices.override(request.path_params["uuid"], body.driver))


async def suspend(service: Service, _request: Request, body: Power) -> None:
    """Suspend devices."""
    await service.devices.run(power.suspend(service.hosts, service.devices, body))


async def resume(service: Service, _request: Request, body: Power) -> None:
    """Resume devices."""
    await service.devices.run(power.resume(service.hosts, service.devices, body))


async def events(service: Service, request: Request, _body: None) -> AsyncIterator[bytes]:
    """Stream events."""
    return service.journal.follow(number(request, "after", int), number(request, "timeout"))


async def counters(service: Service, _request: Request, _body: None) -> dict[str, dict[str, list[int]]]:
    """Read the counters of all devices: one number each, or one for each queue."""
    return await service.hosts.counters()


async def hosts(service: Service, _request: Request, _body: None) -> list[HostInfo]:
    """List hosts."""
    return service.hosts.infos()


async def rescan(service: Service, _request: Request, _body: None) -> list[HostInfo]:
    """Look what is installed."""
    await service.devices.run(service.hosts.rescan())
    return service.hosts.infos()


async def drivers(service: Service, _request: Request, _body: None) -> list[Driver]:
    """List drivers."""
    return await service.hosts.drivers()


async def shut_down(service: Service, _request: Request, body: Shutdown) -> None:
    """End the service."""
    await service.devices.run(service.shut_down(body))


_PARENT: Final = Query("parent", "string", "Only of this parent.")
_ATTRIBUTES: Final = Query("attributes", "boolean", "Whether to read its attributes too; 1 by default.")
_TIMEOUT: Final = Query("timeout", "number", "Seconds a user of the device gets to let go.")

#: The table.
OPERATIONS: Final = [
    Operation("GET", "/v1/version", "Who answers", version, gives=Version, needs_hosts=False),
    Operation("GET", "/v1/parents", "Parents and their types", parents, gives=list[Parent], query=(_PARENT,)),
    Operation("GET", "/v1/parents/{parent}/attributes/{name}", "A parent's attribute", get_parent_attribute, gives=Value),
    Operation(
        "PUT", "/v1/parents/{parent}/attributes/{name}", "Store a parent's attribute", set_parent_attribute, takes=Value, status=204
    ),
    Operation("GET", "/v1/parents/{parent}/types/{type}/attributes/{name}", "A type's attribute", get_type_attribute, gives=Value),
    Operation(
        "PUT",
        "/v1/parents/{parent}/types/{type}/attributes/{name}",
        "Store a type's attribute",
        set_type_attribute,
        takes=Value,
        status=204,
    ),
    Operation("GET", "/v1/devices", "Devices", devices, gives=list[Device], query=(_PARENT,)),
    Operation("POST", "/v1/devices", "Create a device", create, takes=Create, gives=Device, status=201),
    Operation("GET", "/v1/devices/{uuid}", "A device and its attributes", device, gives=DeviceDetail, query=(_ATTRIBUTES,)),
    Operation(
        "DELETE",
        "/v1/devices/{uuid}",
        "Remove a device",
        remove,
        query=(Query("force", "boolean", "Close the connection of whoever uses it."), _TIMEOUT),
        status=204,
    ),
    Operation("PATCH", "/v1/devices/{uuid}", "Store attributes, all or none", set_attributes, takes=Attributes, status=204),
    Operation("GET", "/v1/devices/{uuid}/attributes/{name}", "A device's attribute", get_attribute, gives=Value),
    Operation("PUT", "/v1/devices/{uuid}/attributes/{name}", "Store a device's attribute", set_attribute, takes=Value, status=204),
    Operation("POST", "/v1/devices/{uuid}/bind", "Bind a device to a driver", bind, takes=Bind, gives=Device),
    Operation("POST", "/v1/devices/{uuid}/unbind", "Take a device from its driver", unbind, takes=Unbind, gives=Device),
    Operation(
        "POST",
        "/v1/devices/{uuid}/driver_override",
        "Let one driver only bind a device",
        driver_override,
        takes=DriverOverride,
        gives=Device,
    ),
    Operation(
        "POST", "/v1/suspend", "Suspend a device, a parent with its devices, or everything", suspend, takes=Power, status=204
    ),
    Operation("POST", "/v1/resume", "Resume what is suspended", resume, takes=Power, status=204),
    Operation(
        "GET",
        "/v1/events",
        "What happens, as it happens",
        events,
        query=(
            Query("after", "integer", "Number of the last event that is known; the newest by default."),
            Query("timeout", "number", "End when no event comes for so many seconds."),
        ),
        stream=True,
        needs_hosts=False,
    ),
    Operation("GET", "/v1/counters", "Counters by device and name", counters, gives=dict[str, dict[str, list[int]]]),
    Operation("GET", "/v1/hosts", "Host processes", hosts, gives=list[HostInfo]),
    Operation("POST", "/v1/rescan", "Look for plugins that were installed or removed", rescan, gives=list[HostInfo]),
    Operation("GET", "/v1/drivers", "Drivers that are loaded", drivers, gives=list[Driver]),
    Operation("POST", "/v1/shutdown", "End the service", shut_down, takes=Shutdown, status=202),
]
