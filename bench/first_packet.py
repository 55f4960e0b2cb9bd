"""How long the first packet takes after a rest, in units of an eventfd ping-pong between the same two processors.

    python bench/first_packet.py [PACKETS]

Each packet, and each ping-pong, is sent after a rest in which everybody has gone to sleep (the device's thread polls for 50 us
only), so both include two wake-ups of sleeping threads. Here is processor 0, the other side is pinned to processor 1. In turn:

* ping-pong: an eventfd to a process that sleeps in a read and answers through another eventfd: the unit;
* vhost: a frame of 60 bytes through the mvnet loopback of another process, by our vhost-user frontend: added to the ring, kicked,
  looped, signalled, taken from the ring. Median at most 5 ping-pongs;
* netdev: the same through virtio_mdev and virtio_net in one process, whose interrupt thread hands frames over to us: a third
  wake-up, and all three in one Python interpreter. For comparison.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from mdevkit import Registry
from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.vhost.frontend import NetPair, VhostUserFrontend

MDEVKIT = Path(sys.executable).with_name("mdevkit")
HERE, THERE = 0, 1
#: Seconds of rest between two packets, varied so that nothing beats with timer ticks.
REST = (0.001, 0.003)
FRAME = (b"\xff" * 6 + b"\x02\0\0\0\0\x07" + b"\x88\xb5").ljust(60, b"x")
LIMIT = 5.0


def ping_pong(undo):
    ping, pong = os.eventfd(0), os.eventfd(0)
    pid = os.fork()
    if not pid:
        os.sched_setaffinity(0, {THERE})
        while True:
            os.eventfd_read(ping)
            os.eventfd_write(pong, 1)
    undo.callback(os.waitpid, pid, 0)
    undo.callback(os.kill, pid, signal.SIGKILL)

    def once():
        os.eventfd_write(ping, 1)
        os.eventfd_read(pong)

    return once


def vhost(undo, folder):
    path = f"{folder}/vhost.sock"
    command = [MDEVKIT, "run", "mvnet_loopback-vhost", "--socket", path]
    server = undo.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    undo.callback(server.kill)
    while "serving" not in server.stdout.readline():
        pass
    frontend = undo.enter_context(VhostUserFrontend(path))
    frontend.negotiate()
    memory = GuestMemory(1 << 22)
    undo.callback(memory.close)
    frontend.share(memory)
    pair = NetPair(memory, frontend.features)
    undo.callback(pair.close)
    frontend.start(*pair.queues)
    for thread in Path(f"/proc/{server.pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {THERE})

    def once():
        pair.send([FRAME])
        while not (frames := pair.receive()):
            pair.wait(1)
        assert frames == [FRAME]

    return once


def netdev(undo):
    registry = undo.enter_context(Registry.discover())
    before = {thread.name for thread in Path("/proc/self/task").iterdir()}
    mdev = registry.create("mvnet_loopback-virtio")
    device = mdev.endpoint.device.endpoint.netdev
    frames = undo.enter_context(device.frames())
    device.send(FRAME)
    frames.get(1)
    for thread in Path("/proc/self/task").iterdir():
        if thread.name not in before:
            os.sched_setaffinity(int(thread.name), {THERE})

    def once():
        device.send(FRAME)
        assert frames.get(1) == FRAME

    return once


def main():
    packets = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="mdk"))
        os.environ["XDG_RUNTIME_DIR"] = folder
        ways = {"ping-pong": ping_pong(undo), "vhost": vhost(undo, folder), "netdev": netdev(undo)}
        os.sched_setaffinity(0, {HERE})
        taken = {name: [] for name in ways}
        for _ in range(packets):
            for name, once in ways.items():
                time.sleep(random.uniform(*REST))
                began = time.perf_counter()
                once()
                taken[name].append(time.perf_counter() - began)
    base = statistics.median(taken["ping-pong"])
    for name, seconds in taken.items():
        quantiles = statistics.quantiles(seconds, n=100)
        ratio = statistics.median(seconds) / base
        print(f"{name:10} p50 {quantiles[49] * 1e6:7.1f} us  p99 {quantiles[98] * 1e6:8.1f} us  {ratio:5.2f} ping-pongs")
    ratio = statistics.median(taken["vhost"]) / base
    print(f"first packet: {ratio:.2f} ping-pongs, {LIMIT:g} at most")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
