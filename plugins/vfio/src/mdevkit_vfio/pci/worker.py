"""The worker thread of one device: runs what must happen after an access instead of inside it.

One thread per device, so a device whose client makes it wait delays nobody else. It is started by the first job and ends
with the client.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]
logger = logging.getLogger("mdevkit.vfio")


class Worker:
    """A thread that runs jobs in order. `name` is the thread's name; any thread may call in."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: set[Job] = set()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def submit(self, job: Job) -> None:
        """Run `job` later; ignored once stopped. What it raises is logged and ends that job only.

        A job that waits already is not added again (as with the kernel's queue_work), so a guest that rings a doorbell
        without end cannot make the queue grow while the worker is held up. If the system has no thread left, which is logged,
        the jobs wait until the next one is submitted.
        """
        with self._lock:
            if self._stopped:
                return
            if job not in self._waiting:
                self._waiting.add(job)
                self._jobs.put(job)
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            logger.error("%s cannot start, its jobs have to wait: %s", self._name, error)
        else:
            self._thread = thread

    @property
    def current(self) -> bool:
        """Whether the caller is the worker thread."""
        return self._thread is threading.current_thread()

    @property
    def running(self) -> bool:
        """Whether the thread still lives."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self, timeout: float) -> bool:
        """Drop the jobs not begun and wait up to `timeout` seconds for the running one; False if it still runs."""
        with self._lock:
            self._stopped = True
            thread = self._thread
            self._jobs.put(None)
        if thread is not None and not self.current:
            thread.join(timeout)
        return not self.running

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._waiting.discard(job)
                if self._stopped:
                    return
            try:
                job()
            except Exception:
                logger.exception("a deferred job of %s failed", self._name)
