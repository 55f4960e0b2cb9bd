"""What commands do to reach a running network device: find it, in the service or in ``mdevkit run``, and connect to its socket.

Every mistake a user can make here ends in a sentence that says what is wrong with the device. Any thread may call.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from mdevkit.cli.remote import attach_facts
from mdevkit.errors import MdevError
from mdevkit.running import find

from mdevkit_virtio.virtio.stream import FrameStream

Facts = Mapping[str, Any]
_T = TypeVar("_T")

#: Kinds of endpoints that carry frames, and the driver that makes them.
NETDEV: Final = "netdev"
VHOST_USER: Final = "vhost-user"
_DRIVERS: Final = {NETDEV: "virtio_mdev", VHOST_USER: "vhost_mdev"}
#: What a backend does that serves somebody else.
_HANGS_UP: Final = frozenset({errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE})
#: What connect(2) says of one that has ended.
_GONE: Final = {errno.ECONNREFUSED: "nobody listens at {} any more", errno.ENOENT: "its socket {} does not exist"}


def find_device(prefix: str) -> Facts:
    """Return the facts of a running device whose UUID starts with `prefix`: ENODEV, EINVAL when several do."""
    try:
        return find(prefix)
    except MdevError as error:
        if error.errno != errno.ENODEV:
            raise
    return attach_facts(prefix)


def check_kind(facts: Facts, *wanted: str) -> str:
    """Return the kind of the device's endpoint if it is one of those wanted and nobody uses it.

    ENODEV: it is bound to no driver. EOPNOTSUPP: it is no network device, or bound to another driver. EBUSY: somebody uses it.
    """
    name, kind = f"device {facts['uuid']}", facts.get("kind")
    if kind is None:
        raise MdevError(errno.ENODEV, f"{name} is bound to no driver; try: mdevkit bind {facts['uuid']}")
    if kind == "virtio":
        raise MdevError(errno.ENODEV, f"{name} has no network interface: {facts.get('error') or 'its driver is not ready'}")
    if kind not in _DRIVERS:
        raise MdevError(errno.EOPNOTSUPP, f"{name} is no virtio network device but {facts['type']} ({kind})")
    if kind not in wanted:
        driver = _DRIVERS[wanted[0]]
        rebind = f"mdevkit unbind {facts['uuid']} && mdevkit bind {facts['uuid']} {driver} --override"
        raise MdevError(errno.EOPNOTSUPP, f"{name} is bound to {_DRIVERS[kind]}, this needs {driver}: {rebind}")
    if facts.get("client"):
        raise MdevError(errno.EBUSY, f"{name} is in use by {facts['client']}")
    return str(kind)


def reach(facts: Facts, connect: Callable[[str], _T]) -> _T:
    """Return what `connect` makes of the path of the device's socket: ENODEV if nobody is there, EBUSY if it hangs up on us."""
    name, path = f"device {facts['uuid']}", facts["socket"]
    try:
        return connect(path)
    except OSError as error:
        if error.errno in _HANGS_UP:
            raise in_use(facts) from error
        if error.errno in _GONE:
            raise MdevError(errno.ENODEV, f"{name} is gone: {_GONE[error.errno].format(path)}") from error
        raise MdevError(error.errno or errno.EIO, f"{name}: {path}: {error.strerror}") from error


def open_stream(path: str) -> FrameStream:
    """Connect to a netdev's socket; raw errors of connect(2)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return FrameStream(sock)


def in_use(facts: Facts) -> MdevError:
    """Return the error for a device that hangs up on us before it has sent anything."""
    return MdevError(errno.EBUSY, f"device {facts['uuid']} is in use by another client: it hung up on us")
