"""Everything by which people look at a display: the socket for screenshots, and VNC.

A display has one `Onlookers`. It has a thread only while there is a socket to listen at; that thread sleeps until somebody comes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Mapping
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from mdevkit.errors import MdevError
from mdevkit.paths import runtime_dir
from mdevkit.screen import Frame
from mdevkit.sockets import Listen, listen_at, socket_identity, unlink_socket

from mdevkit_mbochs.attributes import AUTO, OFF, TCP, UNIX
from mdevkit_mbochs.onlookers import access
from mdevkit_mbochs.onlookers.loop import Loop
from mdevkit_mbochs.onlookers.screen import ScreenServer
from mdevkit_mbochs.onlookers.vnc import VncServer

if TYPE_CHECKING:
    from mdevkit.device import Mdev

__all__ = ["Display", "Onlookers"]

log = logging.getLogger("mdevkit.display")


class Display(Protocol):
    """What is looked at; both methods are called on the onlookers' thread."""

    def scanout(self) -> tuple[Frame, mmap] | None:
        """See `DisplayDevice.scanout`."""
        ...

    def export(self) -> tuple[Frame, int]:
        """See `DisplayDevice.export`."""
        ...


class Onlookers:
    """Those who look at `display`. `name` is for titles, logs and the thread. Methods may be called on any thread but that one."""

    def __init__(self, name: str, display: Display) -> None:
        self._name: Final = name
        self._display: Final = display
        self._listen: Listen = listen_at
        # Serialises changes; never held while a display's lock is waited for by the loop.
        self._changes: Final = threading.Lock()
        self._loop: Loop | None = None
        self._closed = False
        self._screen = contextlib.ExitStack()
        self._viewers = contextlib.ExitStack()
        #: Attributes of that name, as set.
        self.screen_socket: str = AUTO
        self.vnc: str = OFF
        self.vnc_password_file: str = ""
        self.vnc_insecure: bool = False
        #: Where the sockets really are; empty without.
        self.screen_path: str = ""
        self.vnc_address: str = ""

    def start(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Let people look as a device's create parameters say.

        Raises what `Mdev.listen` does for a path that was given, and as `set_vnc`. The socket beside the device's own is left out
        where it cannot be made: a guest needs no onlookers.
        """
        self._listen = mdev.listen
        self.screen_socket = params["screen_socket"]
        with self._changes:
            self._start_screen(mdev)
        self.set_vnc(params["vnc"], params["vnc_password_file"], params["vnc_insecure"])

    def _start_screen(self, mdev: Mdev) -> None:
        if self.screen_socket.startswith(UNIX):
            self._open_screen(self.screen_socket.removeprefix(UNIX))
        elif self.screen_socket == AUTO:
            path = Path(mdev.endpoint_path).with_suffix(".screen") if mdev.endpoint_path else runtime_dir() / f"{mdev.name}.screen"
            try:
                self._open_screen(str(path))
            except MdevError as error:
                log.warning("%s: no screenshots can be taken: %s", self._name, error)

    def _open_screen(self, path: str) -> None:
        # Whoever makes the socket may be another process, in another folder.
        path = str(Path(path).absolute())
        with contextlib.ExitStack() as undo:
            listener = self._listen(path)
            undo.callback(unlink_socket, listener, socket_identity(path), path)
            self._serve(undo, partial(ScreenServer, listener=listener, name=self._name, export=self._display.export))
            self._screen = undo.pop_all()
        self.screen_path = path

    def set_vnc(self, vnc: str | None = None, password_file: str | None = None, insecure: bool | None = None) -> None:
        """Change who may look through VNC; what is None stays. Viewers are sent away when the place changes.

        EINVAL for a TCP port without a password that nobody has called insecure; ENODEV once closed; errors of a password file that
        cannot be used, and of sockets that cannot be made. Then everything stays as it was.
        """
        with self._changes:
            if self._closed:
                raise MdevError(errno.ENODEV, f"{self._name} is being removed: nobody can be let in")
            vnc = self.vnc if vnc is None else vnc
            password_file = self.vnc_password_file if password_file is None else password_file
            insecure = self.vnc_insecure if insecure is None else insecure
            access.check(vnc, password_file, insecure)
            before = self.vnc_password_file, self.vnc_insecure
            # First of all: whoever comes to the new place shall find the new password.
            self.vnc_password_file, self.vnc_insecure = password_file, insecure
            try:
                if vnc != self.vnc:
                    self._move(vnc)
            except BaseException:
                self.vnc_password_file, self.vnc_insecure = before
                raise

    def _move(self, vnc: str) -> None:
        """Serve viewers at another place, or nowhere."""
        with contextlib.ExitStack() as undo:
            address = "" if vnc == OFF else self._open_vnc(vnc, undo)
            viewers = undo.pop_all()
        self._viewers.close()
        self._viewers, self.vnc, self.vnc_address = viewers, vnc, address
        self._end_idle_loop()

    def _open_vnc(self, vnc: str, undo: contextlib.ExitStack) -> str:
        if vnc.startswith(UNIX):
            vnc = UNIX + str(Path(vnc.removeprefix(UNIX)).absolute())
        listener = access.listen(vnc, self._listen)
        path = vnc.removeprefix(UNIX)
        undo.callback(unlink_socket, listener, socket_identity(path), path)
        self._serve(
            undo,
            partial(VncServer, listener=listener, name=self._name, scanout=self._display.scanout, password=self._password),
        )
        return _address(listener) if vnc.startswith(TCP) else path

    def _serve(self, undo: contextlib.ExitStack, make: Any) -> None:
        """Have a server made on the loop's thread, and `undo` close it there."""
        if self._loop is None:
            self._loop = Loop(f"{self._name} display")
        loop = self._loop
        made: list[ScreenServer | VncServer] = []
        loop.run(lambda: made.append(make(loop)))
        undo.callback(lambda: loop.run(made[0].close))

    def _password(self) -> bytes | None:
        return access.read_password(self.vnc_password_file) if self.vnc_password_file else None

    def close(self) -> None:
        """Send everybody away and end the thread; nothing is served afterwards. May be called again."""
        with self._changes:
            self._closed = True
            self._viewers.close()
            self._screen.close()
            self.vnc, self.vnc_address, self.screen_path = OFF, "", ""
            self._end_idle_loop()

    def _end_idle_loop(self) -> None:
        if self._loop is not None and not self.screen_path and not self.vnc_address:
            self._loop.close()
            self._loop = None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
