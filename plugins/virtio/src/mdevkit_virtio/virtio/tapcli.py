"""``mdevkit tap UUID [NAME]``: connects a device's netdev with a TAP interface, until Ctrl-C.

The TAP is opened here, by the user's own rights and in the user's network namespace; the process that has the device needs none.
One thread, the main one.
"""

from __future__ import annotations

import errno
import select
import signal
import sys
from contextlib import ExitStack
from typing import Annotated, Final

import typer
from mdevkit.cli.complete import devices
from mdevkit.cli.output import complain, say
from mdevkit.errors import MdevError

from mdevkit_virtio.virtio.clients import NETDEV, check_kind, find_device, in_use, open_stream, reach
from mdevkit_virtio.virtio.stream import FrameStream
from mdevkit_virtio.virtio.tap import Tap

#: Frames moved from the TAP before the other side has its turn.
_BURST: Final = 64


def command(
    uuid: Annotated[
        str, typer.Argument(metavar="UUID", autocompletion=devices, help="The device, or a unique beginning of its UUID.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The interface; made if there is none.")] = "tap%d",
) -> None:
    """Connect a network device with a TAP interface of this host, until Ctrl-C."""
    facts = find_device(uuid)
    check_kind(facts, NETDEV)
    with ExitStack() as undo:
        for number in (signal.SIGINT, signal.SIGTERM):
            undo.callback(signal.signal, number, signal.signal(number, signal.default_int_handler))
        tap = Tap.open(name)
        undo.callback(tap.close)
        try:
            tap.set_up(int(facts["mtu"]))
        except MdevError as error:
            complain(error)
        stream = reach(facts, open_stream)
        undo.callback(stream.close)
        say(f"{tap.name} is connected with device {facts['uuid']}; Ctrl-C ends it")
        sys.stdout.flush()
        pump = Pump(tap, stream)
        try:
            pump.run()
        except KeyboardInterrupt:
            return
        except MdevError as error:
            if error.errno != errno.ECONNRESET:
                raise
            raise _hung_up(facts["uuid"]) if pump.received else in_use(facts) from error


def _hung_up(uuid: str) -> MdevError:
    return MdevError(errno.ENODEV, f"device {uuid} is gone: it hung up on us")


class Pump:
    """Moves frames both ways. What one side cannot take waits here, one frame each way, and the other side is held off."""

    def __init__(self, tap: Tap, stream: FrameStream) -> None:
        self._tap: Final = tap
        self._stream: Final = stream
        #: Frames of the netdev's that the TAP has not taken.
        self._waiting: list[bytes] = []
        #: Frames of the netdev's so far.
        self.received = 0

    def run(self) -> None:
        """Move frames for ever: ECONNRESET once the netdev is gone, EIO once the TAP is."""
        poll = select.poll()
        while True:
            poll.register(self._tap, self._tap_events())
            poll.register(self._stream, self._stream_events())
            poll.poll()
            self._stream.flush()
            if not self._waiting:
                self._waiting = self._stream.receive()
                self.received += len(self._waiting)
            self._to_tap()
            self._to_netdev()

    def _tap_events(self) -> int:
        return (0 if self._stream.blocked else select.POLLIN) | (select.POLLOUT if self._waiting else 0)

    def _stream_events(self) -> int:
        return (0 if self._waiting else select.POLLIN) | (select.POLLOUT if self._stream.blocked else 0)

    def _to_tap(self) -> None:
        while self._waiting and self._tap.write(self._waiting[0]):
            del self._waiting[0]

    def _to_netdev(self) -> None:
        for _ in range(_BURST):
            if self._stream.blocked or (frame := self._tap.read()) is None:
                return
            self._stream.send(frame)
