"""``mdevkit create TYPE``: a device that stays, in the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdevkit.cli.complete import types
from mdevkit.cli.options import settings as check_settings
from mdevkit.cli.options import uuid_text
from mdevkit.cli.output import say, say_json
from mdevkit.client import Client


def command(
    type_id: Annotated[
        str, typer.Argument(metavar="TYPE", autocompletion=types, help="A type as `mdevkit types` shows it, e.g. mtty-2.")
    ],
    parent: Annotated[str | None, typer.Option("--parent", "-p", help="Create it on this parent.")] = None,
    uuid: Annotated[
        str | None, typer.Option("--uuid", "-u", callback=uuid_text, help="The device's UUID; made up by default.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", callback=check_settings, help="Set an attribute.")
    ] = None,
    no_bind: Annotated[bool, typer.Option("--no-bind", help="Look for no driver.")] = False,
    driver: Annotated[str | None, typer.Option("--driver-override", metavar="DRIVER", help="Let only this driver bind it.")] = None,
    socket: Annotated[str | None, typer.Option(metavar="PATH", help="Where to make the device's socket.")] = None,
    owner: Annotated[str | None, typer.Option(metavar="LABEL", help="Whose it is.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell whether it could be created, and where.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Create a device and print its UUID. It goes on until it is removed."""
    wish = {
        "type": type_id,
        "parent": parent,
        "uuid": uuid,
        "attributes": dict(word.split("=", 1) for word in settings or []),
        "bind": not no_bind,
        "driver_override": driver,
        "socket": socket and str(Path(socket).absolute()),
        "owner": owner,
        "dry_run": dry_run,
    }
    with Client() as service:
        device = service.post("/v1/devices", wish)
    if as_json:
        say_json(device)
    elif dry_run:
        say(f"{type_id} can be created on {device['parent']}")
    else:
        say(device["uuid"])
