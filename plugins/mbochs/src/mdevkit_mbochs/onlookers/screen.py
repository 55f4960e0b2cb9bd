"""Hands a display's memory to those who connect to its screen socket (`mdevkit.screen`). Runs on the loop's thread."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from mdevkit import screen
from mdevkit.errors import MdevError, wrap

from mdevkit_mbochs.onlookers.acceptor import Acceptor
from mdevkit_mbochs.onlookers.loop import Loop

#: Returns the picture's place and a new descriptor of the memory; MdevError without a picture.
Export = Callable[[], tuple[screen.Frame, int]]

#: Connections at the same time; the next ones are sent away.
MOST: Final = 32

log = logging.getLogger("mdevkit.display")


class ScreenServer:
    """Serves `listener`, which its maker closes. `name` is for logs."""

    def __init__(self, loop: Loop, listener: socket.socket, name: str, export: Export) -> None:
        self._loop: Final = loop
        self._export: Final = export
        self._peers: Final[set[socket.socket]] = set()
        self._acceptor: Final = Acceptor(loop, listener, name, self._admit)

    def close(self) -> None:
        """Send everybody away."""
        self._acceptor.close()
        for peer in list(self._peers):
            self._drop(peer)

    def _admit(self, peer: socket.socket) -> None:
        if len(self._peers) >= MOST:
            peer.close()
            return
        self._peers.add(peer)
        self._loop.add(peer.fileno(), partial(self._serve, peer))

    def _serve(self, peer: socket.socket, events: int) -> None:
        """Answer a request; a peer that does not take the answers has to go."""
        del events
        try:
            looks = peer.recv(64)
            if not looks or looks.strip(screen.LOOK):
                self._drop(peer)
                return
            for _ in looks:
                self._answer(peer)
        except OSError as error:
            log.debug("a look ended: %s", error)
            self._drop(peer)

    def _answer(self, peer: socket.socket) -> None:
        try:
            frame, fd = self._export()
        except OSError as error:
            peer.send(screen.pack_error(error if isinstance(error, MdevError) else wrap(error, "looking")))
            return
        try:
            socket.send_fds(peer, [screen.pack(frame)], [fd], socket.MSG_NOSIGNAL)
        finally:
            os.close(fd)

    def _drop(self, peer: socket.socket) -> None:
        self._peers.discard(peer)
        self._loop.discard(peer.fileno())
        with suppress(OSError):
            peer.close()
