"""Makes a listening socket with the rights of whoever asked for its path, in a child process of its own.

A process that runs as root, as the system's service does, must not bind a path on behalf of somebody who could not bind it
himself. The child becomes that somebody for good, binds, and passes the socket on.
"""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdevkit.errors import MdevError
from mdevkit.sockets import is_stale, listen_at, socket_identity

from mdevkit_service.wire import send

if TYPE_CHECKING:
    import socket

    from mdevkit.plugins import Catalog


def run(sock: socket.socket, _catalog: Catalog, arguments: dict[str, Any]) -> None:
    """Bind ``path`` as ``uid``, ``gid`` and ``groups``, with ``mode``; or as ourselves for ``owner`` (USER[:GROUP]).

    With ``unlink``, remove the socket at ``path`` instead if nobody listens there any more.
    """
    path, mode = arguments["path"], arguments.get("mode", 0o600)
    if arguments.get("unlink"):
        become(arguments)
        if socket_identity(path) != (0, 0) and is_stale(path):
            Path(path).unlink(missing_ok=True)
        send(sock, {"path": path})
        return
    if not arguments.get("owner"):
        become(arguments)
    os.umask(0)  # this process has no other file to make, and `mode` says it all
    with listen_at(path, mode) as listener:
        if arguments.get("owner"):
            os.chown(path, *ids(arguments["owner"]), follow_symlinks=False)
        send(sock, {"path": path}, [listener.fileno()])


def become(who: dict[str, Any]) -> None:
    """Take on the ids of `who` for good, if they are not ours: EPERM when that is not possible."""
    if who.get("uid") is None or (os.getuid(), os.getgid()) == (who["uid"], who["gid"]):
        return
    try:
        os.setgroups(who.get("groups", []))
        os.setresgid(who["gid"], who["gid"], who["gid"])
        os.setresuid(who["uid"], who["uid"], who["uid"])
    except OSError as error:
        raise MdevError(errno.EPERM, f"cannot act for user {who['uid']}: {error.strerror}") from error


def ids(owner: str) -> tuple[int, int]:
    """Return uid and gid of ``USER[:GROUP]``; EINVAL for one there is not. Without a group, the user's own."""
    import grp

    user, _, group = owner.partition(":")
    try:
        entry = pwd.getpwnam(user)
        return entry.pw_uid, grp.getgrnam(group).gr_gid if group else entry.pw_gid
    except KeyError:
        raise MdevError(errno.EINVAL, f"there is no user or group {owner!r}", owner) from None
