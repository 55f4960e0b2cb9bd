"""``mdevkit unbind UUID``."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.complete import devices
from mdevkit.cli.remote import find
from mdevkit.client import Client


def command(
    uuid: Annotated[
        str, typer.Argument(metavar="UUID", autocompletion=devices, help="The device, or a unique beginning of its UUID.")
    ],
    force: Annotated[bool, typer.Option("--force", "-f", help="Close the connection of whoever uses it.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="How long a user of the device gets to let go.")
    ] = None,
) -> None:
    """Take a device from its driver; it stays, unbound."""
    with Client() as service:
        service.post(f"/v1/devices/{find(service, uuid)}/unbind", {"force": force, "timeout": timeout})
