"""``mdevkit remove UUID...``"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from mdevkit.cli.complete import devices
from mdevkit.cli.output import complain
from mdevkit.cli.remote import find, missing, running_service
from mdevkit.errors import MdevError


def command(
    uuids: Annotated[
        list[str], typer.Argument(metavar="UUID...", autocompletion=devices, help="Devices, or unique beginnings of their UUIDs.")
    ],
    force: Annotated[bool, typer.Option("--force", "-f", help="Close the connection of whoever uses it.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="How long a user of the device gets to let go.")
    ] = None,
) -> None:
    """Remove devices. One that cannot be removed keeps no other from it."""
    query = f"?force={int(force)}" + (f"&timeout={timeout}" if timeout is not None else "")
    failed = False
    with running_service() or nullcontext() as service:
        for uuid in uuids:
            try:
                if service is None:
                    raise missing(uuid)
                service.delete(f"/v1/devices/{find(service, uuid)}{query}")
            except MdevError as error:
                complain(f"{error} [{error.name}]")
                failed = True
    if failed:
        raise typer.Exit(1)
