"""What ``list``, ``show`` and ``types`` print, from what the service tells. Imports nothing that takes time."""

from __future__ import annotations

import errno
import json

from mdevkit.cli.output import BOLD, DIM, GREEN, RED, YELLOW, Painted, complain, say, say_json, state
from mdevkit.cli.remote import definitions, find, foreground, running_service
from mdevkit.client import Client
from mdevkit.errors import MdevError

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from mdevkit.client import Client

    Facts = dict[str, Any]


def list_devices(
    *,
    defined: bool = False,
    tree: bool = False,
    verbose: bool = False,
    as_json: bool = False,
    dump: bool = False,
    uuid: str | None = None,
    parent: str | None = None,
) -> None:
    """Print the devices there are, or those that are defined."""
    if defined:
        with Client() as keeper:
            stored = [item for item in definitions(keeper) if _wanted(item, uuid, parent)]
        _print_definitions(stored, as_json=as_json, dump=dump, verbose=verbose)
        return
    service = running_service()
    devices = [*(service.get("/v1/devices") if service else []), *foreground()]
    devices = sorted(
        filter(lambda device: _wanted(device, uuid, parent), devices), key=lambda facts: (facts["parent"], facts["uuid"])
    )
    if as_json:
        say_json(devices)
    elif tree:
        _print_tree(service.get("/v1/parents") if service else [], devices)
    else:
        _print_devices(service, devices, dump=dump, verbose=verbose)


def _wanted(facts: Facts, uuid: str | None, parent: str | None) -> bool:
    return (uuid is None or facts["uuid"].startswith(uuid.lower())) and parent in {None, facts["parent"]}


def _print_devices(service: Client | None, devices: list[Facts], *, dump: bool, verbose: bool) -> None:
    """Print devices in mdevctl's columns; a failed one says so."""
    stored = {item["uuid"]: item for item in _definitions(service) if not item.get("error")}
    if dump:
        say_json(_dump((device, stored.get(device["uuid"])) for device in devices))
        return
    for device in devices:
        definition = stored.get(device["uuid"])
        start = definition["start"] if definition else "manual"
        note = Painted(" (defined)" if definition else "", DIM)
        failed = Painted(" (failed)" if device["state"] == "failed" else "", RED)
        say(f"{device['uuid']} {device['parent']} {device['type']} {start}", note, failed)
        if verbose:
            _print_attributes(definition["attrs"] if definition else [])
            _print_state(device)


def _definitions(service: Client | None) -> list[Facts]:
    """Return the definitions, to say which devices have one; where they cannot be read the devices are listed all the same."""
    try:
        return definitions(service) if service else []
    except MdevError as error:
        complain(f"{error} [{error.name}]")
        return []


def _print_definitions(stored: list[Facts], *, as_json: bool, dump: bool, verbose: bool) -> None:
    """Print definitions in mdevctl's columns; one that cannot be read is named with the reason."""
    if as_json:
        say_json(stored)
        return
    good = [item for item in stored if not item.get("error") or item.get("mdev_type")]
    if dump:
        say_json(_dump((item, item) for item in good))
    else:
        for item in good:
            active = Painted(" (active)" if item["active"] else "", GREEN)
            say(f"{item['uuid']} {item['parent']} {item['mdev_type']} {item['start']}", active)
            if verbose:
                _print_attributes(item["attrs"])
    for item in stored:
        if item.get("error"):
            complain(f"{item['path']}: {item['error']}")


def _dump(pairs: Iterable[tuple[Facts, Facts | None]]) -> list[Facts]:
    """Return mdevctl's JSON: one object keyed by parent."""
    parents: dict[str, list[Facts]] = {}
    for facts, definition in pairs:
        config = {
            "mdev_type": facts.get("type") or facts.get("mdev_type"),
            "start": definition["start"] if definition else "manual",
            "attrs": definition["attrs"] if definition else [],
        }
        parents.setdefault(facts["parent"], []).append({facts["uuid"]: config})
    return [parents] if parents else []


def _print_attributes(attributes: Sequence[Facts]) -> None:
    if attributes:
        say("  Attrs:")
    for index, attribute in enumerate(attributes):
        say(f"    @{{{index}}}: {json.dumps(attribute, separators=(',', ':'))}")


def _print_state(device: Facts) -> None:
    endpoint = device.get("endpoint") or device
    facts = {
        "State": f"{device['state']}, suspended" if device.get("suspended") else device["state"],
        "Driver": device.get("driver"),
        "Socket": endpoint.get("socket"),
        "Client": endpoint.get("client"),
        "Owner": device.get("owner"),
        "Error": device.get("error"),
    }
    for name, value in facts.items():
        if value:
            say(f"  {name}: {value}")


def _print_tree(parents: list[Facts], devices: list[Facts]) -> None:
    """Print parents, their types, and the devices of each."""
    known = {parent["name"]: parent for parent in parents}
    for name in sorted({*known, *(device["parent"] for device in devices)}):
        parent = known.get(name, {"types": []})
        say(Painted(name, BOLD), _asleep(parent), Painted(f" ({parent['error']})" if parent.get("error") else "", RED))
        own = [device for device in devices if device["parent"] == name]
        room = {type_["id"]: type_["available_instances"] for type_ in parent["types"]}
        for type_id in [*room, *sorted({device["type"] for device in own} - set(room))]:
            say(f"  {type_id}", Painted(f" ({room[type_id]} available)" if type_id in room else "", DIM))
            for device in own:
                if device["type"] == type_id:
                    say(f"    {device['uuid']} ", state(device["state"]), *_tail(device))


def _tail(device: Facts) -> Iterable[object]:
    """Yield what follows a device's state: whether it sleeps, its driver, whose it is, what is wrong with it."""
    yield _asleep(device)
    if device.get("driver"):
        yield f" {device['driver']}"
    if device.get("owner"):
        yield Painted(f" owner={device['owner']}", DIM)
    if device.get("error"):
        yield Painted(f" ({device['error']})", RED)


def _asleep(facts: Facts) -> Painted:
    """Return the word for a device or parent that is suspended; nothing for others."""
    return Painted(" suspended" if facts.get("suspended") else "", YELLOW)


def show_device(uuid: str, *, as_json: bool = False) -> None:
    """Print everything about one device; ENODEV."""
    device = next((facts for facts in foreground() if facts["uuid"].startswith(uuid.lower())), None)
    if device is None:
        service = running_service()
        if service is None:
            raise MdevError(errno.ENODEV, f"there is no device {uuid!r}", uuid)
        device = service.get(f"/v1/devices/{find(service, uuid)}")
    if as_json:
        say_json(device)
        return
    plain = {name: value for name, value in device.items() if name not in {"attributes", "attach", "endpoint"}}
    for name, value in {**plain, **(device.get("endpoint") or {})}.items():
        if value not in {None, "", False}:
            shown = state(value) if name == "state" else "yes" if value is True else value
            say(Painted(f"{name.replace('_', ' '):16}", DIM), shown)
    for name, value in device.get("attributes", {}).items():
        say(Painted(f"{'attribute':16}", DIM), f"{name} = {value}")


def list_types(parents: list[Facts], *, as_json: bool = False) -> None:
    """Print types as mdevctl's ``types`` does, of parents as the service describes them."""
    if as_json:
        say_json([{parent["name"]: [{type_["id"]: _type_facts(type_)} for type_ in parent["types"]]} for parent in parents])
        return
    for parent in parents:
        say(Painted(parent["name"], BOLD))
        for type_ in parent["types"]:
            _print_type(type_)


def _type_facts(type_: Facts) -> Facts:
    facts = {"available_instances": type_["available_instances"], "device_api": type_["device_api"]}
    return facts | {name: type_[name] for name in ("name", "description") if type_[name]}


def _print_type(type_: Facts) -> None:
    say(f"  {type_['id']}")
    say(f"    Available instances: {type_['available_instances']}")
    say(f"    Device API: {type_['device_api']}")
    if type_["name"]:
        say(f"    Name: {type_['name']}")
    if type_["description"]:
        say(f"    Description: {type_['description'].replace(chr(10), ', ')}")
