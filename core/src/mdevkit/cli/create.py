"""``mdevkit create TYPE``: a device that stays, in the service."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.options import AsJson, Parent, Settings, Socket, TypeId, Uuid, endpoint_path
from mdevkit.cli.output import need_output, say, say_json, say_made
from mdevkit.client import Client


def command(
    type_id: TypeId,
    parent: Parent = None,
    uuid: Uuid = None,
    settings: Settings = None,
    no_bind: Annotated[bool, typer.Option("--no-bind", help="Look for no driver.")] = False,
    driver: Annotated[str | None, typer.Option("--driver-override", metavar="DRIVER", help="Let only this driver bind it.")] = None,
    socket: Socket = None,
    owner: Annotated[str | None, typer.Option(metavar="LABEL", help="Whose it is.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell whether it could be created, and where.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create a device and print its UUID. It goes on until it is removed."""
    wish = {
        "type": type_id,
        "parent": parent,
        "uuid": uuid,
        "attributes": dict(word.split("=", 1) for word in settings or []),
        "bind": not no_bind,
        "driver_override": driver,
        "socket": endpoint_path(socket),
        "owner": owner,
        "dry_run": dry_run,
    }
    need_output()
    with Client() as service:
        device = service.post("/v1/devices", wish)
    if dry_run and not as_json:
        say(f"{type_id} can be created on {device['parent']}")
    elif dry_run:
        say_json(device)
    else:
        say_made(device["uuid"], value=device if as_json else None)
