"""What a shell may complete beside subcommands and options; for ``autocompletion`` of typer's parameters.

Called while somebody has pressed Tab: nothing is started, and whatever goes wrong there is nothing to complete.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from mdevkit.cli.remote import foreground
from mdevkit.client import Client
from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def devices(incomplete: str) -> list[str]:
    """Return the UUIDs of devices in the foreground and in a running service."""
    return [facts["uuid"] for facts in [*_foreground(), *_listed("devices")] if facts["uuid"].startswith(incomplete.lower())]


def devices_with(*kinds: str) -> Callable[[str], list[str]]:
    """Return what completes UUIDs of those devices that have an endpoint of one of those kinds."""

    def found(incomplete: str) -> list[str]:
        endpoints = {facts["uuid"]: facts for facts in _foreground()}
        endpoints |= {facts["uuid"]: facts["endpoint"] or {} for facts in _listed("devices")}
        wanted = (uuid for uuid, endpoint in endpoints.items() if endpoint.get("kind") in kinds)
        return [uuid for uuid in wanted if uuid.startswith(incomplete.lower())]

    return found


def power_targets(incomplete: str) -> list[str]:
    """Return the parents of a running service, and its devices."""
    parents = [facts["name"] for facts in _listed("parents") if facts["name"].startswith(incomplete)]
    return parents + [facts["uuid"] for facts in _listed("devices") if facts["uuid"].startswith(incomplete.lower())]


def _foreground() -> list[dict[str, Any]]:
    with suppress(MdevError):
        return foreground()
    return []


def _listed(what: str) -> list[dict[str, Any]]:
    """Return the devices or parents of a running service; none without one."""
    with suppress(MdevError), Client(start=False) as service:
        found: list[dict[str, Any]] = service.get(f"/v1/{what}")
        return found
    return []


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
