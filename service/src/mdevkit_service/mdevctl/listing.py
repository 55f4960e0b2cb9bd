"""What mdevctl's ``list`` and ``types`` print: the columns, and the JSON that others read."""

from __future__ import annotations

import json
import sys

from mdevkit.cli.output import say

from mdevkit_service.callouts import running
from mdevkit_service.definitions import BadDefinition, Definition
from mdevkit_service.mdevctl.manager import attribute_line

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from mdevkit_service.mdevctl.manager import Manager


def list_devices(
    manager: Manager,
    warn: Callable[[str], None],
    *,
    defined: bool = False,
    dumpjson: bool = False,
    verbose: bool = False,
    uuid: str | None = None,
    parent: str | None = None,
) -> None:
    """Print running devices, or definitions. A definition that cannot be used is warned of."""
    found = _definitions(manager, warn, parent) if defined else _devices(manager, parent)
    found = [(device, note) for device, note in found if uuid in {None, device.uuid}]
    if dumpjson:
        _print_json(_dump([device for device, _ in found], bare=uuid is not None))
        return
    for device, note in found:
        say(f"{device.uuid} {device.parent} {device.mdev_type} {device.start}{note}")
        if verbose and device.attrs:
            say("  Attrs:")
            for index, attribute in enumerate(device.attrs):
                say(attribute_line(index, attribute))


def _devices(manager: Manager, parent: str | None) -> list[tuple[Definition, str]]:
    """Return the running devices, with the attributes their scripts know and the start mode they are defined with."""
    stored = {(entry.parent, entry.uuid): entry for entry in manager.store.entries(parent) if isinstance(entry, Definition)}
    found = []
    for device in manager.devices(parent):
        definition = stored.get((device.parent, device.uuid))
        shown = running(manager.scripts, device).changed(start=definition.start if definition else "manual")
        found.append((shown, " (defined)" if definition else ""))
    return found


def _definitions(manager: Manager, warn: Callable[[str], None], parent: str | None) -> list[tuple[Definition, str]]:
    active = {(device.parent, device.uuid) for device in manager.devices(parent)}
    found = []
    for entry in manager.store.entries(parent):
        if isinstance(entry, BadDefinition):
            warn(f"{entry.path}: {entry.error}")
        else:
            found.append((entry, " (active)" if (entry.parent, entry.uuid) in active else ""))
    return found


def _dump(devices: list[Definition], *, bare: bool) -> Any:
    """Return one array with one object keyed by parent; with `bare`, a single device is its configuration alone."""
    if bare and len(devices) == 1:
        return devices[0].config
    parents: dict[str, list[dict[str, Any]]] = {}
    for device in devices:
        parents.setdefault(device.parent, []).append({device.uuid: device.config})
    return [parents] if parents else []


def list_types(manager: Manager, *, parent: str | None = None, dumpjson: bool = False) -> None:
    """Print the types of every parent, or of one; nothing for one there is not."""
    parents = [facts for facts in manager.parents() if parent in {None, facts["name"]}]
    if dumpjson:
        by_name = {facts["name"]: [{type_["id"]: _facts(type_)} for type_ in facts["types"]] for facts in parents}
        _print_json([by_name] if by_name else [])
        return
    for facts in parents:
        say(facts["name"])
        for type_ in facts["types"]:
            _print_type(type_["id"], _facts(type_))


def _facts(type_: dict[str, Any]) -> dict[str, Any]:
    facts = {"available_instances": type_["available_instances"], "device_api": type_["device_api"]}
    texts = {"name": type_["name"], "description": type_["description"].replace("\n", ", ")}
    return facts | {name: text for name, text in texts.items() if text}


def _print_type(type_id: str, facts: dict[str, Any]) -> None:
    say(f"  {type_id}")
    titles = {
        "available_instances": "Available instances",
        "device_api": "Device API",
        "name": "Name",
        "description": "Description",
    }
    for name, value in facts.items():
        say(f"    {titles[name]}: {value}")


def _print_json(value: Any) -> None:
    """Print JSON as mdevctl does: without a line's end. What the output's encoding lacks is escaped, as JSON has it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    sys.stdout.write(text)
