"""A program for tests of fronts: a warmed process that forks, at each line on stdin, a process that serves a device.

    nursery.py CONTROL SOCKET FATAL PATIENCE

The device counts: every access changes it, so one that is lost, or carried out twice, shows for ever after. The program prints
the pid of each process it has forked. Such a process serves the device until it is killed, or told to end by SIGTERM.
"""

import logging
import os
import signal
import struct
import sys
import time
from pathlib import Path

from mdevkit_vfio.front.wire import Limits
from mdevkit_vfio.pci import Bar, Msix, PciDevice, PciIds
from mdevkit_vfio.transport import Fronts, ParkedServer

#: Registers of BAR 0: the number of reads of it so far; a sum over everything written; a queue of bytes, and its length; the
#: pin; 1 kills the process, more takes as many milliseconds; sends a message; a doorbell for a job that reads guest memory,
#: and a sum over what it has read.
TICKET, SUM, QUEUE, LENGTH, PIN, DIE, FIRE, DMA = range(0, 32, 4)
STATE = struct.Struct("<IIQ")
#: Where the job reads.
SOURCE = 0x10000


class Counter(PciDevice):
    """See the module."""

    def __init__(self):
        self.ticket = self.sum = self.jobs = 0
        self.queue = bytearray()
        bars = {0: Bar(4096), 2: Bar(8192)}
        super().__init__(PciIds(0x1234, 1), bars, interrupt_pin=1, msi_vectors=4, msix=Msix(40, 2), name="counter")

    def device_reset(self):
        self.ticket = self.sum = self.jobs = 0
        self.queue.clear()

    def device_checkpoint(self):
        return STATE.pack(self.ticket, self.sum, self.jobs) + self.queue

    def device_restore(self, state):
        self.ticket, self.sum, self.jobs = STATE.unpack_from(state)
        self.queue[:] = state[STATE.size :]

    def bar_read(self, bar, offset, size):
        if offset == TICKET:
            self.ticket += 1
            return self.ticket
        if offset == SUM:
            return self.sum
        if offset == QUEUE:
            return self.queue.pop(0) if self.queue else 0
        return {LENGTH: len(self.queue), DMA: self.jobs}.get(offset, 0)

    def bar_write(self, bar, offset, size, value):
        if offset == SUM:
            self.sum = (self.sum * 31 + value) & 0xFFFFFFFF
        elif offset == QUEUE:
            self.queue.append(value & 0xFF)
        elif offset == PIN:
            self.set_intx(bool(value))
        elif offset == DIE and value == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        elif offset == DIE:
            time.sleep(value / 1000)  # a device that takes its time
        elif offset == FIRE:
            self.trigger_msi(value)
        elif offset == DMA:
            self.defer(self.job)

    def job(self):
        data = self.dma.read(SOURCE, 4096)
        with self.lock:
            self.jobs += sum(data)


def serve(control, path, limits):
    server = ParkedServer(Counter(), Path(path), "counter", fronts=Fronts(Path(control)), limits=limits)
    parent = os.getppid()
    server.start()
    # Nor does it outlive a test run that was killed.
    while signal.sigtimedwait({signal.SIGTERM}, 1) is None and os.getppid() == parent:
        pass
    server.close()


def main():
    control, path, fatal, patience = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    logging.basicConfig(format="%(process)d %(name)s: %(message)s", level=logging.WARNING)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                serve(control, path, Limits(int(fatal), float(patience)))
                code = 0
            except OSError as error:
                sys.stderr.write(f"{error}\n")
                sys.stderr.flush()
            finally:
                os._exit(code)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
