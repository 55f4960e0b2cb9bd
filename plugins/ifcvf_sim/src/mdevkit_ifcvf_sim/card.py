"""What the functions of one card share: what it does with their frames, each function's back to it, or between them by address.

Loaded to list types, so it is small: the rings are imported when a function is put into use. Frames are moved on threads of the
functions' rings; any thread may add and remove functions.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit_ifcvf_sim.rings import LoopRings, SwitchRings

LOOPBACK: Final = "loopback"
SWITCH: Final = "switch"


class Card:
    """The part of the card its functions share."""

    def __init__(self) -> None:
        self._forwarding = LOOPBACK
        self._functions: list[LoopRings | SwitchRings] = []
        #: Those of them that are on the switch.
        self._ports: list[SwitchRings] = []
        self._lock: Final = threading.Lock()

    @property
    def forwarding(self) -> str:
        """``loopback`` or ``switch``."""
        return self._forwarding

    def set_forwarding(self, forwarding: str) -> None:
        """Say what is done with frames from now on: EBUSY while a function is in use."""
        with self._lock:
            if forwarding != self._forwarding and self._functions:
                used = ", ".join(map(str, self._functions))
                raise MdevError(errno.EBUSY, f"forwarding stays {self._forwarding} while functions are in use ({used})", self)
            self._forwarding = forwarding

    def add(self, mac: bytes, name: str) -> LoopRings | SwitchRings:
        """Return the rings of a function that is now in use."""
        from mdevkit_ifcvf_sim.rings import LoopRings, SwitchRings

        with self._lock:
            if self._forwarding == LOOPBACK:
                self._functions.append(rings := LoopRings(mac, name))
                return rings
            port = SwitchRings(self, mac, name)
            self._functions.append(port)
            self._ports.append(port)
            return port

    def remove(self, rings: LoopRings | SwitchRings) -> None:
        """Take a function out of use and end its threads."""
        with self._lock:
            self._functions.remove(rings)
            self._ports = [port for port in self._ports if port is not rings]
        rings.close()

    def forward(self, source: SwitchRings, frame: bytes) -> None:
        """Carry a frame to the function that has its address; a group's, and one for nobody known, goes to all others."""
        with self._lock:
            others = [port for port in self._ports if port is not source]
        exact = [port for port in others if port.mac == frame[:6]]
        for port in exact or others:
            port.deliver(frame)
