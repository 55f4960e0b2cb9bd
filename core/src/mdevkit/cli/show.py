"""``mdevkit show UUID``: everything about one device."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.complete import devices
from mdevkit.cli.listing import show_device


def command(
    uuid: Annotated[
        str, typer.Argument(metavar="UUID", autocompletion=devices, help="The device, or a unique beginning of its UUID.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a device: state, driver, endpoint, attributes."""
    show_device(uuid, as_json=as_json)
