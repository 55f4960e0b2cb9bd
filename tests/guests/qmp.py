"""QEMU's machine protocol over a connected socket, as far as tests need it: commands, and waiting for events.

Blocking, with a time limit on every wait; for one thread at a time.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any


class QmpError(Exception):
    """QEMU refused a command, went away, or did not answer in time."""


class Qmp:
    """A QMP session. Takes over `connection` and closes it with `close`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        #: Events that nobody has waited for yet, oldest first.
        self.events: list[dict[str, Any]] = []

    def start(self, timeout: float) -> None:
        """Read the greeting and leave capability negotiation."""
        deadline = time.monotonic() + timeout
        if "QMP" not in (greeting := self._receive(deadline)):
            raise QmpError(f"not a QMP greeting: {greeting}")
        self.execute("qmp_capabilities")

    def execute(self, command: str, timeout: float = 10, /, **arguments: Any) -> Any:
        """Run a command and return its result; QmpError with QEMU's sentence if it refuses."""
        deadline = time.monotonic() + timeout
        request = {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            self.events.append(message)

    def wait_event(self, name: str, timeout: float = 10) -> dict[str, Any]:
        """Return the data of the oldest event `name` not yet waited for, also one that came before the call."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    data: dict[str, Any] = event.get("data", {})
                    return data
            self.events.append(self._receive(deadline))

    def close(self) -> None:
        """Close the connection; QEMU goes on."""
        self._connection.close()

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self._connection.recv(65536)
            except (TimeoutError, OSError) as error:
                raise QmpError(f"QEMU does not answer: {error}") from error
            if not data:
                raise QmpError("QEMU is gone")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
