"""``mdevkit define, undefine, modify, start, stop, apply``: mdevctl's options and meaning, and what goes beyond.

Registered in the entry-point group ``mdevkit.cli``. Errors are one line and the exit code, as those of all ``mdevkit`` commands.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from mdevkit.cli.output import complain, need_output, say, say_json, say_made
from mdevkit.cli.remote import in_foreground
from mdevkit.client import Client
from mdevkit.errors import MdevError

from mdevkit_service.definitions import uuid_of
from mdevkit_service.mdevctl.manager import Manager, chain, start_path
from mdevkit_service.mdevctl.program import warn
from mdevkit_service.mdevctl.store import find_store


def _uuid(text: str | None) -> str | None:
    if text is None:
        return None
    uuid = uuid_of(text)
    if not uuid:
        raise typer.BadParameter(f"{text!r} is not a UUID")
    return uuid


def _named(text: str | None) -> str | None:
    if text == "":
        raise typer.BadParameter("it is empty")
    return text


Uuid = Annotated[str | None, typer.Option("--uuid", "-u", metavar="UUID", callback=_uuid, help="The device.")]
NeededUuid = Annotated[str, typer.Option("--uuid", "-u", metavar="UUID", callback=_uuid, help="The device.")]
Parent = Annotated[str | None, typer.Option("--parent", "-p", metavar="PARENT", callback=_named, help="The parent.")]
Type = Annotated[str | None, typer.Option("--type", "-t", metavar="TYPE", callback=_named, help="The type, e.g. mtty-2.")]
Auto = Annotated[bool, typer.Option("--auto", "-a", help="Start the device with its parent.")]
JsonFile = Annotated[str | None, typer.Option("--jsonfile", metavar="FILE", help="Type, start mode and attributes.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Go on even if a callout script objects.")]
Owner = Annotated[str | None, typer.Option("--owner", metavar="LABEL", help="Whose it is.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]


@contextmanager
def _manager() -> Iterator[tuple[Manager, Client]]:
    """Give a manager and its client; errors come out with their causes in one sentence."""
    try:
        with Client() as client:
            store, packaged = find_store(client)
            yield Manager(client, store, packaged, warn, complain), client
    except MdevError as error:
        if error.__cause__ is None:
            raise
        raise MdevError(error.errno or errno.EIO, chain(error), error.subject) from None


def _exclude(**given: object) -> None:
    """Refuse options that exclude each other."""
    names = [f"--{name}" for name, value in given.items() if value]
    if len(names) > 1:
        raise typer.BadParameter(f"{' and '.join(names)} exclude each other")


def _need(message: str, *given: object) -> None:
    if not any(given):
        raise typer.BadParameter(message)


def define(
    uuid: Uuid = None,
    parent: Parent = None,
    type_id: Type = None,
    auto: Auto = False,
    jsonfile: JsonFile = None,
    owner: Owner = None,
    force: Force = False,
) -> None:
    """Store the definition of a device; without --uuid, make one up and print it."""
    _need("--uuid or --parent is wanted", uuid, parent)
    _exclude(jsonfile=jsonfile, type=type_id)
    _exclude(jsonfile=jsonfile, auto=auto)
    if uuid is None:
        need_output()
    with _manager() as (manager, _):
        made = manager.define(uuid=uuid, parent=parent, type=type_id, auto=auto, jsonfile=jsonfile, owner=owner, force=force)
    if uuid is None:
        say_made(made)


def undefine(uuid: NeededUuid, parent: Parent = None, force: Force = False) -> None:
    """Remove the definitions of a device, or one parent's. A device that runs goes on."""
    with _manager() as (manager, _):
        manager.undefine(uuid=uuid, parent=parent, force=force)


def modify(
    uuid: NeededUuid,
    parent: Parent = None,
    type_id: Type = None,
    addattr: Annotated[str | None, typer.Option(metavar="NAME", help="Add an attribute.")] = None,
    delattr_: Annotated[bool, typer.Option("--delattr", help="Remove an attribute.")] = False,
    index: Annotated[
        int | None, typer.Option("--index", "-i", min=0, metavar="N", help="Where in the list; its end by default.")
    ] = None,
    value: Annotated[str | None, typer.Option(metavar="VALUE", help="The added attribute's value.")] = None,
    auto: Auto = False,
    manual: Annotated[bool, typer.Option("--manual", "-m", help="Start the device by hand only.")] = False,
    live: Annotated[bool, typer.Option("--live", "-l", help="Change the running device, at once.")] = False,
    defined: Annotated[bool, typer.Option("--defined", "-d", help="Change the definition; with --live, too.")] = False,
    jsonfile: JsonFile = None,
    force: Force = False,
) -> None:
    """Change a definition, or with --live a running device: by its vendor's callout script, else by its attributes."""
    _need("nothing to change is given", type_id, addattr, delattr_, auto, manual, jsonfile)
    _exclude(addattr=addattr, delattr=delattr_, jsonfile=jsonfile)
    _exclude(auto=auto, manual=manual, jsonfile=jsonfile)
    _exclude(type=type_id, jsonfile=jsonfile)
    _exclude(type=type_id, live=live)
    if addattr is not None and value is None:
        raise typer.BadParameter("--addattr needs --value")
    options: dict[str, Any] = {"uuid": uuid, "parent": parent, "jsonfile": jsonfile, "force": force}
    changes: dict[str, Any] = {"type": type_id, "addattr": addattr, "value": value, "delattr": delattr_, "index": index}
    with _manager() as (manager, _):
        if live:
            manager.set_live(**options, addattr=addattr, value=value, auto=auto, manual=manual, delattr=delattr_)
        if defined or not live:
            manager.modify(**options, **changes, auto=auto, manual=manual)


def start(
    uuid: Uuid = None,
    parent: Parent = None,
    type_id: Type = None,
    jsonfile: JsonFile = None,
    force: Force = False,
    ensure: Annotated[bool, typer.Option("--ensure", help="Be content when it runs already.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Start a device, by its definition or by parent and type; without --uuid, make one up and print it."""
    _need("--uuid or --parent is wanted", uuid, parent)
    _exclude(jsonfile=jsonfile, type=type_id)
    if uuid is None:
        need_output()
    with _manager() as (manager, client):
        if dry_run:
            definition = manager.to_start(uuid, parent, type_id, jsonfile)
            client.post(start_path(definition), {**definition.config, "dry_run": True})
            say(f"{definition.mdev_type} can be started on {definition.parent}")
            return
        made = manager.start(uuid=uuid, parent=parent, type=type_id, jsonfile=jsonfile, force=force, ensure=ensure)
    if uuid is None:
        say_made(made)


def stop(uuid: NeededUuid, force: Force = False) -> None:
    """Stop a device. Its definition stays."""
    with _manager() as (manager, _):
        try:
            manager.stop(uuid=uuid, force=force)
        except MdevError as error:
            if error.errno == errno.ENODEV and (elsewhere := in_foreground(uuid)):
                raise elsewhere from None
            raise


def apply(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="What shall be, as `list --defined --dumpjson` prints it; - for stdin.")
    ],
    owner: Owner = None,
    prune: Annotated[bool, typer.Option("--prune", help="Stop and undefine what has this owner and is not in the file.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Stop and start what cannot be changed while it runs.")] = False,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make definitions and devices what a file says, with as few changes as will do. Prints the changes."""
    wish = {"definitions": _wanted(_read(file)), "owner": owner, "prune": prune, "restart": restart, "dry_run": dry_run}
    with Client() as client:
        changes = client.post("/v1/apply", wish)["changes"]
    if as_json:
        say_json(changes)
    for change in [] if as_json else changes:
        detail = f" ({change['detail']})" if change["detail"] else ""
        say(f"{change['action']} {change['uuid']} {change['parent']}{detail}")
        if change["error"]:
            complain(f"{change['uuid']}: {change['error']}")
    if any(change["error"] for change in changes):
        raise typer.Exit(1)


def _read(file: Path) -> Any:
    try:
        return json.loads(sys.stdin.read() if os.fspath(file) == "-" else file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MdevError(error.errno or errno.EIO, f"{file} cannot be read: {error.strerror}", file) from error
    except (ValueError, RecursionError) as error:
        raise MdevError(errno.EINVAL, f"{file}: invalid JSON: {error}", file) from None


def _wanted(value: Any) -> list[Any]:
    """Return the definitions of a file: a list of them, or what mdevctl dumps, one object keyed by parent."""
    try:
        if all("uuid" in item for item in value):
            return list(value)
        return [
            {"parent": parent, "uuid": uuid, **config}
            for parents in value
            for parent, devices in parents.items()
            for device in devices
            for uuid, config in device.items()
        ]
    except (AttributeError, TypeError):
        raise MdevError(errno.EINVAL, "a list of definitions is wanted, as `list --defined --dumpjson` prints it") from None
