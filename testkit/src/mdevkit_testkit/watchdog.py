"""Ends a check that hangs: a plugin that waits for ever must not make whoever checks it wait for ever too."""

from __future__ import annotations

import faulthandler
import os
import threading
import time

import pytest


class Watchdog:
    """A pytest plugin: when a test takes longer than `limit` seconds, says which and where each thread stands, and exits with 1.

    There is no other way out: a thread that waits in the kernel or for a lock cannot be interrupted from outside.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._running: tuple[str, float] | None = None
        self._changed = threading.Condition()
        # pytest captures what tests write to the usual descriptor.
        self._stderr = os.dup(2)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note that a test begins."""
        self._note((nodeid.rpartition("::")[2], time.monotonic() + self._limit))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """Note that it is over."""
        self._note(None)

    def _note(self, running: tuple[str, float] | None) -> None:
        with self._changed:
            self._running = running
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                if self._running is None:
                    self._changed.wait()
                elif (left := self._running[1] - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._end(self._running[0])

    def _end(self, name: str) -> None:
        os.write(self._stderr, f"FAILED {name}: it has not ended after {self._limit:g} seconds\n".encode())
        faulthandler.dump_traceback(self._stderr)
        os._exit(1)
