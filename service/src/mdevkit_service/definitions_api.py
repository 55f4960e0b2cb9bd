"""The operations of the control API that are about definitions; see `mdevkit_service.api` for the table's shape."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import msgspec
from mdevkit.errors import MdevError

from mdevkit_service.api import Operation, Query, flag, peer
from mdevkit_service.apply import Apply, Changes, apply
from mdevkit_service.defined import DefinitionInfo
from mdevkit_service.definitions import Definition, check_attributes, check_current, check_parent, uuid_of
from mdevkit_service.schema import Device

if TYPE_CHECKING:
    from starlette.requests import Request

    from mdevkit_service.definitions import Entry
    from mdevkit_service.service import Service


class StoreDefinition(msgspec.Struct, forbid_unknown_fields=True):
    """A definition that is to be stored."""

    mdev_type: str
    #: ``auto`` to start with the parent; any other word means by hand.
    start: str = "manual"
    #: One name and value each, stored in this order; a name may come several times.
    attrs: list[dict[str, str]] = []
    #: A label; without it, a stored one stays.
    owner: str | msgspec.UnsetType | None = msgspec.UNSET


class StartDefinition(msgspec.Struct, forbid_unknown_fields=True):
    """What to start instead of what is stored; all by default as it is stored."""

    mdev_type: str | None = None
    start: str = "manual"
    attrs: list[dict[str, str]] = []
    owner: str | None = None
    #: Only tell whether it could be started.
    dry_run: bool = False


async def definitions(service: Service, request: Request, _body: None) -> list[DefinitionInfo]:
    """List definitions, those that cannot be used among them."""
    uuid, parent = request.query_params.get("uuid"), request.query_params.get("parent")
    if parent is not None:
        check_parent(parent)
    drift = "drift" not in request.query_params or flag(request, "drift")
    return await service.defined.every(_uuid(uuid) if uuid else None, parent, drift=drift)


async def store_definition(service: Service, request: Request, body: StoreDefinition) -> DefinitionInfo:
    """Store a definition, whatever is there; with If-None-Match: * a new one only, with If-Match: TAG in place of that one only."""
    parent, uuid = _place(request)
    create, tag = request.headers.get("if-none-match") == "*", request.headers.get("if-match")
    attrs = check_attributes(body.attrs)

    def change(current: Entry | None) -> Definition:
        check_current(current, parent, uuid, create=create, tag=tag)
        extra = dict(current.extra) if isinstance(current, Definition) else {}
        if body.owner is not msgspec.UNSET:
            extra["owner"] = body.owner
        return Definition(parent, uuid, body.mdev_type, body.start, attrs, {k: v for k, v in extra.items() if v is not None})

    await service.devices.run(service.defined.put(parent, uuid, change))
    return await service.defined.one(parent, uuid)


async def remove_definition(service: Service, request: Request, _body: None) -> None:
    """Remove a definition; a device that runs goes on."""
    parent, uuid = _place(request)
    await service.devices.run(service.defined.remove(parent, uuid, request.headers.get("if-match")))


async def start_definition(service: Service, request: Request, body: StartDefinition) -> Device:
    """Start a definition, the stored one or the one in the body."""
    parent, uuid = _place(request)
    ensure = flag(request, "ensure")
    if body.mdev_type is None and not body.dry_run:
        return await service.devices.run(service.defined.start_stored(parent, uuid, peer(request), ensure=ensure))
    if body.mdev_type is None:
        definition = await service.defined.off_loop(service.defined.store.get, parent, uuid)
    else:
        extra = {"owner": body.owner} if body.owner is not None else {}
        definition = Definition(parent, uuid, body.mdev_type, body.start, check_attributes(body.attrs), extra)
    start = service.defined.start(definition, peer(request), ensure=ensure, dry_run=body.dry_run)
    return await service.devices.run(start)


async def apply_definitions(service: Service, request: Request, body: Apply) -> Changes:
    """Make definitions and devices what is wanted, with as few changes as will do, and tell which."""
    return await service.devices.run(apply(service.defined, body, peer(request)))


def _place(request: Request) -> tuple[str, str]:
    return check_parent(request.path_params["parent"]), _uuid(request.path_params["uuid"])


def _uuid(text: Any) -> str:
    uuid = uuid_of(text)
    if not uuid:
        raise MdevError(errno.EINVAL, f"{text!r} is not a UUID (8-4-4-4-12 hex digits)", text)
    return uuid


_ONE: Final = "/v1/definitions/{parent}/{uuid}"

#: The table.
OPERATIONS: Final = [
    Operation(
        "GET",
        "/v1/definitions",
        "Definitions",
        definitions,
        gives=list[DefinitionInfo],
        query=(
            Query("uuid", "string", "Only of this device."),
            Query("parent", "string", "Only of this parent."),
            Query("drift", "boolean", "Whether to compare them with what runs; by default so."),
        ),
    ),
    Operation("PUT", _ONE, "Store a definition", store_definition, takes=StoreDefinition, gives=DefinitionInfo),
    Operation("DELETE", _ONE, "Remove a definition", remove_definition, status=204),
    Operation(
        "POST",
        f"{_ONE}/start",
        "Start a definition",
        start_definition,
        takes=StartDefinition,
        gives=Device,
        query=(Query("ensure", "boolean", "Be content with a device of this parent and type that is there."),),
    ),
    Operation("POST", "/v1/apply", "Make definitions and devices what is wanted", apply_definitions, takes=Apply, gives=Changes),
]
