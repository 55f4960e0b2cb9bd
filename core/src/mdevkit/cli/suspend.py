"""``mdevkit suspend``: quiesce devices, children before parents."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.complete import power_targets
from mdevkit.cli.remote import find
from mdevkit.client import Client

Target = Annotated[
    str | None,
    typer.Argument(metavar="[UUID|PARENT]", autocompletion=power_targets, help="A device, or a parent with all its devices."),
]
All = Annotated[bool, typer.Option("--all", help="Everything.")]


def command(target: Target = None, everything: All = False) -> None:
    """Suspend a device, a parent with its devices, or everything.

    Drivers quiesce their devices, children before parents. One that refuses ends it: what was suspended is resumed.
    """
    with Client() as service:
        service.post("/v1/suspend", wish(service, target, everything))


def wish(service: Client, target: str | None, everything: bool) -> dict[str, str]:
    """Return what to ask the service for: ENODEV or EINVAL for a target that is none, usage for none or two."""
    if (target is None) != everything:
        raise typer.BadParameter("a UUID, a parent or --all is wanted")
    if target is None:
        return {}
    if any(parent["name"] == target for parent in service.get("/v1/parents")):
        return {"parent": target}
    return {"device": find(service, target)}
