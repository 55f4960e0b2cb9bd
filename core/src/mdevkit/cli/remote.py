"""What commands ask the service, and the devices that run in the foreground without it. Imports nothing that takes time."""

from __future__ import annotations

import errno
import os

from mdevkit.client import Client
from mdevkit.errors import MdevError
from mdevkit.paths import control_socket, runtime_path

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from typing import Any

    Facts = dict[str, Any]

_UUID_LENGTH = 36
_NOTE_LENGTH = _UUID_LENGTH + len(".json")


def running_service() -> Client | None:
    """Return the service that runs, None when there is none; one is started when there are devices that need it."""
    path = control_socket()
    try:
        return Client(path, start=_has_records(os.path.dirname(path)))  # noqa: PTH120
    except MdevError as error:
        if error.errno != errno.ECONNREFUSED:
            raise
    return None


def _has_records(runtime: str) -> bool:
    """Whether a service that has ended has left devices."""
    try:
        return any(name.endswith(".json") for name in os.listdir(f"{runtime}/devices"))  # noqa: PTH208
    except OSError:
        return False


def foreground() -> list[Facts]:
    """Return the devices of ``mdevkit run``."""
    try:
        noted = any(len(name) == _NOTE_LENGTH and name.endswith(".json") for name in os.listdir(runtime_path()))  # noqa: PTH208
    except OSError:
        noted = False
    if not noted:
        return []
    from mdevkit.running import running

    return running()


def find(service: Client, prefix: str) -> str:
    """Return the UUID of the service's device whose UUID starts with `prefix`: EINVAL when several do, `missing` when none does."""
    if len(prefix) >= _UUID_LENGTH and not os.path.lexists(f"{runtime_path()}/{prefix.lower()}.json"):
        return prefix
    found = [device["uuid"] for device in service.get("/v1/devices") if device["uuid"].startswith(prefix.lower())]
    if len(found) > 1:
        raise MdevError(errno.EINVAL, f"{prefix!r} is the beginning of {len(found)} devices' UUIDs", prefix)
    if not found:
        raise missing(prefix)
    return str(found[0])


def missing(prefix: str) -> MdevError:
    """Return the error for a device the service does not have: `in_foreground`, else ENODEV."""
    return in_foreground(prefix) or MdevError(errno.ENODEV, f"there is no device {prefix!r}", prefix)


def in_foreground(prefix: str) -> MdevError | None:
    """Return the error for a device that is asked of the service, but is one of ``mdevkit run``: EBUSY; None if it is none."""
    for facts in foreground():
        if facts["uuid"].startswith(prefix.lower()):
            whose = f"belongs to process {facts['pid']}, an mdevkit run, and is ended there (Ctrl-C)"
            return MdevError(errno.EBUSY, f"device {facts['uuid']} {whose}", prefix)
    return None


def definitions(service: Client) -> list[Facts]:
    """Return the definitions; none from a service that knows none."""
    try:
        found: list[Facts] = service.get("/v1/definitions")
    except MdevError as error:
        if error.errno != errno.ENOENT:
            raise
        found = []
    return found


def attach_facts(uuid: str) -> Facts:
    """Return what there is to know to attach a client to a device of the service; ENODEV."""
    service = running_service()
    if service is None:
        raise MdevError(errno.ENODEV, f"there is no running device {uuid!r}", uuid)
    with service:
        device: Facts = service.get(f"/v1/devices/{find(service, uuid)}")
    if device["error"]:
        raise MdevError(errno.ENODEV, f"device {device['uuid']}: {device['error']}", uuid)
    return device | (device.pop("endpoint") or {})
