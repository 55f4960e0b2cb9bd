"""uvicorn on a socket of our own: the right mode from the first moment, and every peer checked by its credentials."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import grp
import logging
import os
import pwd
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from mdevkit.errors import MdevError
from mdevkit.peers import credentials
from uvicorn.protocols.http.h11_impl import H11Protocol

from mdevkit_service.records import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from uvicorn._types import ASGIApplication

log = logging.getLogger("mdevkit.service")

#: First descriptor of socket activation (sd_listen_fds(3)).
_LISTEN_FDS_START: Final = 3
#: SO_PEERGROUPS (asm-generic/socket.h); Python has no name for it.
_SO_PEERGROUPS: Final = 59
#: The largest socket option Python reads, in bytes.
_MAX_OPTION: Final = 1024
#: Seconds a connection may be idle, and the end of the service waits for requests.
_KEEP_ALIVE: Final = 600
_GRACE: Final = 3


def group_id(name: str | None) -> int | None:
    """Return the id of a group; EINVAL when there is none of that name."""
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise MdevError(errno.EINVAL, f"there is no group {name!r}", name) from None


def inherited() -> socket.socket | None:
    """Return the socket systemd passed, if it passed one to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    os.set_inheritable(_LISTEN_FDS_START, False)
    return socket.socket(fileno=_LISTEN_FDS_START)


def bind(path: Path, group: int | None) -> socket.socket:
    """Return a socket that listens at `path`, for our user, or for a group too. The caller holds the service's lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode of the socket before it has a name is the mode of the file.
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(os.fsencode(path))
    if group is not None:
        os.chown(path, -1, group)
        path.chmod(0o660)
    listener.listen(128)
    return listener


def peer_of(sock: socket.socket) -> Peer:
    """Return the ids of the process at the other end, as they were when it connected (unix(7))."""
    pid, uid, gid = credentials(sock)
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION))
    except OSError:
        # More groups than Python's getsockopt has room for; those the user has by the system's files will do.
        return Peer(pid, uid, gid, _groups_of(uid, gid))
    return Peer(pid, uid, gid, list(groups))


def _groups_of(uid: int, gid: int) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return []


class Admission:
    """Who may talk to the service: our user, root, and the members of a group."""

    def __init__(self, group: int | None) -> None:
        self._group: Final = group
        self._uids: Final = {0, os.getuid()}

    def admits(self, peer: Peer) -> bool:
        """Tell whether `peer` may come in."""
        return peer.uid in self._uids or (self._group is not None and self._group in {peer.gid, *peer.groups})


def protocol(admission: Admission) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with a check of the peer, who is then in each request's state."""

    class Protocol(H11Protocol):
        """One connection."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
            """Let the peer in, or hang up."""
            super().connection_made(transport)
            peer = peer_of(transport.get_extra_info("socket"))
            self.app_state = {**self.app_state, "peer": peer}
            if not admission.admits(peer):
                log.warning("user %d is not admitted", peer.uid)
                transport.abort()

    return Protocol


class Server(uvicorn.Server):
    """uvicorn's server with our own end: a signal ends it in order, and is not raised again."""

    #: Called when the end begins.
    ending: Callable[[], None]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as the wish to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        yield

    def stop(self) -> None:
        """End as soon as what is being answered is answered."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell those who would stream for ever, then end as uvicorn does."""
        self.ending()
        await super().shutdown(sockets)


def make_server(app: ASGIApplication | Callable[..., Any], admission: Admission, ending: Callable[[], None]) -> Server:
    """Return a server that is not running yet; it calls `ending` before it waits for what is being answered."""
    config = uvicorn.Config(
        app,
        http=protocol(admission),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        date_header=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
    )
    server = Server(config)
    server.ending = ending
    return server
