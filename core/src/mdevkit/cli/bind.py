"""``mdevkit bind UUID [DRIVER]``: drivers by hand."""

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
    driver: Annotated[str | None, typer.Argument(metavar="DRIVER", help="Whichever matches, by default.")] = None,
    override: Annotated[bool, typer.Option("--override", help="Set driver_override, so that it need not match.")] = False,
) -> None:
    """Bind a device to a driver."""
    if override and driver is None:
        raise typer.BadParameter("--override needs a DRIVER")
    with Client() as service:
        service.post(f"/v1/devices/{find(service, uuid)}/bind", {"driver": driver, "override": override})
