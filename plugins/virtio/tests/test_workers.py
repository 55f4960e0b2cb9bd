"""Workers, where it matters who else calls them; what they do for a device is in the tests of the model."""

from __future__ import annotations

import os

from mdevkit_virtio.workers import BufferWorker


def test_a_worker_that_has_ended_is_woken_in_vain():
    """Whoever has frames for a device may be late; the descriptor may have become somebody else's by then."""
    worker = BufferWorker("late", [0], lambda *_: None, lambda *_: None)
    worker.close()
    somebody_elses = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    worker.wake(0)
    with worker.paused():
        pass
    os.eventfd_write(somebody_elses, 1)
    assert os.eventfd_read(somebody_elses) == 1
    os.close(somebody_elses)
