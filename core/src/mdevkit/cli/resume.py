"""``mdevkit resume``: let devices that were suspended go on."""

from __future__ import annotations

from mdevkit.cli.suspend import All, Target, wish
from mdevkit.client import Client


def command(target: Target = None, everything: All = False) -> None:
    """Resume a device, a parent with its devices, or everything: parents before children."""
    with Client() as service:
        service.post("/v1/resume", wish(service, target, everything))
