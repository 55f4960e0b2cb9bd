"""Follows the service's events, on a thread of its own: what the view remembers is forgotten, and listeners of udev are told.

A service that ends may come back: until then nothing is remembered, and every look-up says EIO.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit.client import Client

    from mdevkit_service.sysfs.calls import Calls
    from mdevkit_service.sysfs.view import View

log = logging.getLogger("mdevkit.sysfs")

#: Seconds between attempts to find a service again.
_RETRY: Final = 0.25

Event = dict[str, Any]


class Follower:
    """The thread. `told` gets every event after it was taken note of."""

    def __init__(self, calls: Calls, view: View, told: Callable[[Event], None] | None = None) -> None:
        self._calls: Final = calls
        self._view: Final = view
        self._told: Final = told
        #: Number of the newest event, None before the first service.
        self._last: int | None = None
        self._never: Final = threading.Event()

    def start(self) -> None:
        """Start the thread; it ends with the process."""
        threading.Thread(target=self._run, name="events", daemon=True).start()

    def _run(self) -> None:
        silent = False
        while True:
            try:
                self._follow()
            except (MdevError, json.JSONDecodeError) as error:
                if not silent:
                    log.warning("no events: %s", error)
                silent = True
            else:
                silent = False
            self._view.remember(False)
            self._never.wait(_RETRY)

    def _follow(self) -> None:
        """Read events from one service until it ends."""
        with self._calls.connected() as client:
            self._last = newest(client) if self._last is None else self._last
        with self._calls.connected() as client:
            events = client.events(self._last)
            # From the event asked for on, none passes us by; so what is learned from now on is forgotten in time.
            self._view.remember(True)
            log.info("following events of the service at %s", self._calls.path)
            for event in events:
                self._take(event)

    def _take(self, event: Event) -> None:
        if "lagged" in event:
            log.warning("%d events were lost", event["lagged"])
            self._view.remember(True)
            return
        self._last = event["seq"]
        self._view.forget(event["subject"])
        if self._told:
            self._told(event)


def newest(client: Client) -> int:
    """Return the number of the newest event, 0 when there was none yet; takes over the connection."""
    last = 0
    for event in client.events(after=0, timeout=0):
        last = event.get("seq", last)
    return last
