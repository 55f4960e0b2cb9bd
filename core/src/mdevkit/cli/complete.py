"""What a shell may complete beside subcommands and options; for ``autocompletion`` of typer's parameters.

Called while somebody has pressed Tab: nothing is started, and whatever goes wrong there is nothing to complete.
"""

from __future__ import annotations

from contextlib import suppress

from mdevkit.cli.remote import foreground
from mdevkit.client import Client
from mdevkit.errors import MdevError


def devices(incomplete: str) -> list[str]:
    """Return the UUIDs of devices in the foreground and in a running service."""
    found: list[str] = []
    with suppress(MdevError):
        found += [facts["uuid"] for facts in foreground()]
    with suppress(MdevError), Client(start=False) as service:
        found += [device["uuid"] for device in service.get("/v1/devices")]
    return [uuid for uuid in found if uuid.startswith(incomplete.lower())]


def types(incomplete: str) -> list[str]:
    """Return the types a running service has, or those of the installed parents."""
    return sorted({type_ for type_ in _types() if type_.startswith(incomplete)})


def _types() -> list[str]:
    with suppress(MdevError), Client(start=False) as service:
        return [type_["id"] for parent in service.get("/v1/parents") for type_ in parent["types"]]
    from mdevkit.registry import Registry

    with suppress(MdevError), Registry.discover() as registry:
        return [type_ for parent in registry.parents for type_ in parent.types]
    return []
