"""``mdevkit console UUID``: a terminal on a device's serial port.

What a console is, core knows by attribute names alone, so that any parent may have some: an attribute ``NAME_path`` says what to
open, a terminal or a UNIX socket (empty: nothing), and its sibling ``NAME`` says where the port leads, ``pty``, ``unix:PATH`` or
``loopback``. Anything else is no console. A port on loopback is switched to ``pty`` while the device runs, if its parent lets it.

What the guest sends reaches the terminal as it is: that is what a console is for. One thread, the main one.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mdevkit.cli.complete import devices
from mdevkit.cli.output import complain, unwritable
from mdevkit.cli.remote import find as find_in_service
from mdevkit.cli.remote import running_service
from mdevkit.errors import MdevError
from mdevkit.running import find

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from mdevkit.client import Client

#: Ctrl-], which telnet and virsh console take, too.
ESCAPE: Final = b"\x1d"
#: Seconds without output that end a console whose input has ended: the guest has said what it had to say.
QUIET: Final = 0.5
#: Bytes that may wait for the guest before a pipe is read on.
_WAITING: Final = 1 << 16

_PATH: Final = "_path"
_PTY, _LOOPBACK, _UNIX = "pty", "loopback", "unix:"
_INPUT, _OUTPUT = 0, 1


def command(
    uuid: Annotated[
        str, typer.Argument(metavar="UUID", autocompletion=devices, help="The device, or a unique beginning of its UUID.")
    ],
    port: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Which port; the first that leads somewhere, by default.")
    ] = None,
) -> None:
    """Talk to a device's serial port, from the terminal or in a pipe; a device with a display instead shows it."""
    try:
        name, path = _find(uuid, port)
    except MdevError as error:
        if error.errno != errno.EOPNOTSUPP or port is not None:
            raise
        _show_display(uuid, error)
        return
    line = _open(name, path)
    try:
        _talk(line, name)
    finally:
        os.close(line)


def _show_display(uuid: str, no_console: MdevError) -> None:
    """Show the display of a device without a console; `no_console` if it has neither."""
    from mdevkit.cli.screenshot import screen_path
    from mdevkit.cli.viewing import show

    try:
        path = screen_path(uuid)
    except MdevError as error:
        raise (no_console if error.errno == errno.EOPNOTSUPP else error) from None
    show(path)


def _find(uuid: str, port: int | None) -> tuple[str, str]:
    """Return a console's name and what to open: ENODEV, EINVAL, EOPNOTSUPP or ENOENT (no such console), ENOTCONN."""
    try:
        facts = find(uuid)
    except MdevError as error:
        if error.errno != errno.ENODEV:
            raise
        return _find_in_service(uuid, port)
    name = choose(facts["uuid"], facts["attributes"], port)
    if not (path := facts["attributes"][name + _PATH]):
        message = f"{name} of device {facts['uuid']} leads nowhere ({_LOOPBACK}); start it with: mdevkit run --set {name}={_PTY}"
        raise MdevError(errno.ENOTCONN, message, uuid)
    return name, path


def _find_in_service(uuid: str, port: int | None) -> tuple[str, str]:
    service = running_service()
    if service is None:
        raise MdevError(errno.ENODEV, f"there is no running device {uuid!r}", uuid)
    with service:
        device = service.get(f"/v1/devices/{find_in_service(service, uuid)}")
        if device["error"] and not device["attributes"]:
            raise MdevError(errno.ENODEV, f"device {device['uuid']}: {device['error']}", uuid)
        name = choose(device["uuid"], device["attributes"], port)
        return name, device["attributes"][name + _PATH] or _connect(service, device["uuid"], name)


def _connect(service: Client, uuid: str, name: str) -> str:
    """Let a port lead to a terminal; what the device says if it does not let us."""
    folder = f"/v1/devices/{uuid}/attributes/"
    service.put(folder + name, {"value": _PTY})
    complain(f"{name} was on {_LOOPBACK}; it is set to {_PTY} now")
    path: str = service.get(folder + name + _PATH)["value"]
    return path


def choose(uuid: str, attributes: Mapping[str, str], port: int | None) -> str:
    """Return the name of the console `port`, by default the first that leads somewhere; EOPNOTSUPP or ENOENT without it."""
    names = [name for name, leads in attributes.items() if name + _PATH in attributes and _is_far_end(leads)]
    if not names:
        raise MdevError(errno.EOPNOTSUPP, f"device {uuid} has no console", uuid)
    if port is None:
        return next((name for name in names if attributes[name + _PATH]), names[0])
    for name in names:
        if name[len(name.rstrip("0123456789")) :] == str(port):
            return name
    raise MdevError(errno.ENOENT, f"device {uuid} has no console {port} (there are: {', '.join(names)})", uuid)


def _is_far_end(text: str) -> bool:
    return text in {_PTY, _LOOPBACK} or text.startswith(_UNIX)


def _open(name: str, path: str) -> int:
    """Return a descriptor of a terminal or a connected socket that does not block; errors say what cannot be opened."""
    try:
        try:
            line = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:  # what open(2) says of a socket
                raise
            return _dial(path)
        if os.isatty(line):
            # Whoever was here before may have set it otherwise; nothing that waits in it shall be thrown away.
            tty.setraw(line, termios.TCSANOW)
    except OSError as error:
        raise MdevError(error.errno or errno.EIO, f"{name}: cannot open {path}: {error.strerror}", path) from error
    return line


def _dial(path: str) -> int:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(os.fsencode(path))
        peer.setblocking(False)
        return peer.detach()


def _talk(line: int, name: str) -> None:
    if not os.isatty(_INPUT):
        _Pump(line, name, interactive=False).run()
        return
    complain(f"connected to {name}; Ctrl-] leaves")
    try:
        with _raw_terminal():
            _Pump(line, name, interactive=True).run()
    finally:
        complain("")


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Let every key through while the block runs; the terminal is as it was afterwards, however it ends."""

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    before = termios.tcgetattr(_INPUT)
    handlers: dict[int, Any] = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        # What has been typed ahead is meant for the guest.
        tty.setraw(_INPUT, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(_INPUT, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Pump:
    """Moves bytes both ways until the input ends or, interactive, the escape is typed.

    The device may hold us off for as long as the guest does not read: typed bytes wait here meanwhile, so that the escape is
    seen always; a pipe is held off in turn.
    """

    def __init__(self, line: int, name: str, *, interactive: bool) -> None:
        self._line = line
        self._name = name
        self._interactive = interactive
        self._waiting = b""
        self._ended = self._left = False

    def run(self) -> None:
        """Return when it is over; ENODEV when the device ends it."""
        while not self._left:
            done = self._ended and not self._waiting
            readable, writable, _ = select.select(
                self._sources(), [self._line] if self._waiting else [], [], QUIET if done else None
            )
            if done and not readable:
                return
            if self._line in readable:
                _write(self._receive())
            if _INPUT in readable:
                self._take(os.read(_INPUT, 4096))
            if writable:
                self._send()
        if self._waiting:
            self._send()  # what was typed right before the escape

    def _sources(self) -> list[int]:
        wanted = not self._ended and (self._interactive or len(self._waiting) < _WAITING)
        return [self._line, _INPUT] if wanted else [self._line]

    def _take(self, data: bytes) -> None:
        self._ended = not data
        if self._interactive:
            data, escape, _ = data.partition(ESCAPE)
            self._left = bool(escape) or self._ended
        self._waiting += data

    def _send(self) -> None:
        try:
            self._waiting = self._waiting[os.write(self._line, self._waiting) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._closed() from error

    def _receive(self) -> bytes:
        try:
            data = os.read(self._line, 4096)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            raise self._closed()
        return data

    def _closed(self) -> MdevError:
        return MdevError(errno.ENODEV, f"the device has closed {self._name}", self._name)


def _write(data: bytes) -> None:
    try:
        while data:
            data = data[os.write(_OUTPUT, data) :]
    except OSError as error:
        raise unwritable(error) from None
