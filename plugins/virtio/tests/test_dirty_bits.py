"""Several queue pairs log into one byte of the dirty log: each has a thread, and none may lose another's bit."""

from __future__ import annotations

import os
import threading

from mdevkit_virtio.memory import DirtyLog
from mdevkit_virtio.ring import mark_dirty

PAGE = 4096
ROUNDS = 2000


def test_threads_do_not_lose_each_others_bits():
    fd = os.memfd_create("log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, ROUNDS)
    log = DirtyLog(fd, ROUNDS)

    def mark(bit):
        for byte in range(ROUNDS):
            mark_dirty(log, (byte * 8 + bit) * PAGE, 1)

    threads = [threading.Thread(target=mark, args=(bit,)) for bit in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.pread(fd, ROUNDS, 0) == b"\x0f" * ROUNDS
    os.close(fd)
