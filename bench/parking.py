"""What surviving costs: a register access through a front, beside the same access served directly.

    python bench/parking.py [ROUNDS] [ACCESSES]

One device, two servers, a client that waits for each reply as a guest's processor does. The ways take turns, in reversed order
every other round, on one processor (where the work is what counts) and on any (where wake-ups are). Each figure is the median over
rounds of a round's median.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mdevkit_mtty.model import MttyDevice
from mdevkit_vfio import proto
from mdevkit_vfio.proto import Command
from mdevkit_vfio.server import VfioUserServer
from mdevkit_vfio.transport import Fronts, ParkedServer

SCR = 7
READ = proto.message(1, Command.REGION_READ, proto.Access(SCR, 0, 1).pack())
WRITE = proto.message(1, Command.REGION_WRITE, proto.Access(SCR, 0, 1).pack() + b"\x5a")
#: Posted writes that are sent before a read waits for all of them.
BURST = 200


def serve(folder: Path, way: str) -> int:
    """Start a process that serves a card; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    device, path, parent = MttyDevice(1), folder / way, os.getppid()
    server = (
        ParkedServer(device, path, "card", fronts=Fronts(folder / "c")) if way == "front" else VfioUserServer(device, path, "card")
    )
    server.start()
    while signal.sigtimedwait({signal.SIGTERM}, 1) is None and os.getppid() == parent:
        pass
    server.close()
    os._exit(0)


def connect(path: Path) -> socket.socket:
    """Return a connection that has said VERSION."""
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)  # the server starts
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.send(proto.message(0, Command.VERSION, proto.Version(0, 0).pack()))
    client.recv(4096)
    return client


def times(client: socket.socket, message: bytes, count: int) -> list[float]:
    """Return the seconds each exchange took."""
    send, receive, clock = client.send, client.recv, time.perf_counter
    found = []
    for _ in range(count):
        began = clock()
        send(message)
        receive(4096)
        found.append(clock() - began)
    return found


def posted(client: socket.socket, count: int) -> float:
    """Return seconds per posted write."""
    one = proto.message(1, Command.REGION_WRITE, proto.Access(SCR, 0, 1).pack() + b"\x5a", proto.NO_REPLY)
    began = time.perf_counter()
    for _ in range(count // BURST):
        client.sendall(one * BURST)
        client.send(READ)
        client.recv(4096)
    return (time.perf_counter() - began) / (count // BURST * BURST)


def measure(way: str, count: int) -> dict[str, float]:
    """Return the figures of one fresh process, in microseconds."""
    with tempfile.TemporaryDirectory(prefix="parking-") as name:
        folder = Path(name)
        pid = serve(folder, way)
        with connect(folder / way) as client:
            times(client, READ, 500)
            reads, writes = sorted(times(client, READ, count)), sorted(times(client, WRITE, count))
            figures = {
                "read p50": statistics.median(reads),
                "read p99": reads[len(reads) * 99 // 100],
                "write p50": statistics.median(writes),
                "posted": posted(client, count),
            }
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        while any(folder.iterdir()):
            time.sleep(0.05)  # the porter ends by itself
    return {name: seconds * 1e6 for name, seconds in figures.items()}


def compare(rounds: int, count: int) -> None:
    """Measure both ways and print the figures."""
    found: dict[str, list[dict[str, float]]] = {"direct": [], "front": []}
    for number in range(rounds):
        for way in sorted(found, reverse=bool(number % 2)):
            found[way].append(measure(way, count))
    for name in found["direct"][0]:
        direct, front = (statistics.median(figures[name] for figures in found[way]) for way in ("direct", "front"))
        print(f"  {name:10} direct {direct:7.1f} us   front {front:7.1f} us   {front - direct:+7.1f} us   x{front / direct:.2f}")


def main() -> None:
    """Run."""
    rounds, count = (int(word) for word in (*sys.argv[1:], "5", "4000")[:2]) if len(sys.argv) < 3 else map(int, sys.argv[1:3])
    print("on one processor")
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everything)})
    compare(rounds, count)
    os.sched_setaffinity(0, everything)
    print("on any processor")
    compare(rounds, count)


if __name__ == "__main__":
    main()
