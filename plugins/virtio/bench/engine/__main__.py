"""Frames per second of the loopback, engine against engine and against nothing but the copies.

    python plugins/virtio/bench/engine [--rounds N] [--seconds S] [--json]

A driver written in C (driver.c) sends every frame it gets again; the engine's data thread moves it from the transmit to the
receive queue of the same device. Each has a processor of its own. Rounds alternate between all cases, so that a
noisy machine hurts all of them alike; a round in which a thread got less than 0.93 of its processor is dropped and counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mdevkit_virtio.datathread import DataThread
from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.engine import load
from mdevkit_virtio.layout import Feature, MoveOptions, area_sizes
from mdevkit_virtio.memory import MemoryTable, Region
from mdevkit_virtio.queue import QueueConfig, Virtqueue

NUM = 1024
IN_FLIGHT = 1024
STRIDE = 2304
BUFFERS = 4096
FAIR_SHARE = float(os.environ.get("FS", "0.93"))


class RingC(ctypes.Structure):
    """As ring_t in driver.c."""

    _fields_ = (
        ("desc", ctypes.c_void_p),
        ("driver", ctypes.c_void_p),
        ("device", ctypes.c_void_p),
        ("num", ctypes.c_uint32),
        ("packed", ctypes.c_uint32),
        ("free", ctypes.c_uint32),
        ("avail", ctypes.c_uint16),
        ("used", ctypes.c_uint16),
        ("avail_wrap", ctypes.c_uint8),
        ("used_wrap", ctypes.c_uint8),
        ("buffers", ctypes.c_uint32 * 32768),
    )


class BenchC(ctypes.Structure):
    """As bench_t in driver.c."""

    _fields_ = (
        ("tx", RingC),
        ("rx", RingC),
        ("memory", ctypes.c_void_p),
        ("pool_at", ctypes.c_uint64),
        ("stride", ctypes.c_uint32),
        ("frame", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("stack", ctypes.c_uint32 * 65536),
        ("frames", ctypes.c_uint64),
        ("stop", ctypes.c_uint32),
        ("bad", ctypes.c_uint64),
    )


class Case(NamedTuple):
    """What is measured."""

    engine: str
    packed: bool
    size: int

    def __str__(self) -> str:
        return f"{self.engine:6} {'packed' if self.packed else 'split':6} {self.size:5} B"


def build_driver() -> ctypes.CDLL:
    """Compile driver.c."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "driver.so"
        source = Path(__file__).with_name("driver.c")
        subprocess.run(["gcc", "-O3", "-shared", "-fPIC", "-Wall", "-o", library, source], check=True)
        driver = ctypes.CDLL(str(library))
    driver.bench_floor.restype = ctypes.c_double
    driver.bench_floor.argtypes = [ctypes.c_void_p, ctypes.c_uint64, *[ctypes.c_uint32] * 3, ctypes.c_double]
    return driver


class Setup:
    """Memory, rings and buffers of one run."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.memory = GuestMemory(1 << 25)
        self.features = Feature.VERSION_1 | (Feature.RING_PACKED if case.packed else Feature(0))
        self.c = BenchC()
        self.c.memory = self.memory.host
        self.rings = [self._ring(self.c.tx), self._ring(self.c.rx)]
        self.c.pool_at = self.memory.allocate(STRIDE * BUFFERS, 4096)
        self.c.stride, self.c.frame, self.c.count = STRIDE, case.size, BUFFERS
        self.c.stack[:BUFFERS] = range(BUFFERS)
        self.memory.map[self.c.pool_at : self.c.pool_at + STRIDE * BUFFERS] = bytes(STRIDE * BUFFERS)

    def _ring(self, ring: RingC) -> tuple[int, int, int]:
        places = [self.memory.allocate(size, 4096) for size in area_sizes(NUM, packed=self.case.packed)]
        ring.desc, ring.driver, ring.device = (self.memory.host + place for place in places)
        ring.num, ring.packed, ring.free = NUM, self.case.packed, NUM
        ring.avail_wrap = ring.used_wrap = 1
        # A polling driver: no signals.
        at = places[1] + (2 if self.case.packed else 0)
        self.memory.map[at : at + 2] = b"\1\0"
        return tuple(places)

    def queues(self) -> list[Virtqueue]:
        """Start the device's queues."""
        table = MemoryTable([Region(self.memory.fd, 0, self.memory.size)])
        queues = []
        for name, places in zip(("tx", "rx"), self.rings, strict=True):
            queue = Virtqueue(name, load(self.case.engine))
            queue.start(table, QueueConfig(NUM, *places, self.features))
            queues.append(queue)
        return queues


def pin(cpu: int) -> None:
    """Keep this thread on one processor."""
    os.sched_setaffinity(threading.get_native_id(), {cpu})


def cpu_time(thread: int) -> float:
    """Return the processor time of a thread of ours, in seconds."""
    fields = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
    return int(fields[0]) * 1e-9


def measure(driver: ctypes.CDLL, case: Case, seconds: float) -> tuple[float, float]:
    """Return frames per second, and the smaller share of a processor that one of the two threads got."""
    setup = Setup(case)
    tx, rx = setup.queues()
    data = DataThread("data", tx.engine, spin_us=1_000_000)
    data.set_movers([tx.engine.mover(tx.ring, rx.ring, MoveOptions(mergeable=True))])
    threads: dict[str, int] = {}

    def drive() -> None:
        threads["driver"] = threading.get_native_id()
        pin(1)
        driver.bench_begin(ctypes.byref(setup.c), IN_FLIGHT)
        driver.bench_run(ctypes.byref(setup.c))

    data.start()
    os.sched_setaffinity(data.native_id, {0})
    worker = threading.Thread(target=drive)
    worker.start()
    time.sleep(0.2)  # caches and clocks warm up
    ids = (data.native_id, threads["driver"])
    before, started, frames = [cpu_time(i) for i in ids], time.monotonic(), setup.c.frames
    time.sleep(seconds)  # the measurement
    elapsed = time.monotonic() - started
    rate = (setup.c.frames - frames) / elapsed
    share = min((cpu_time(i) - b) / elapsed for i, b in zip(ids, before, strict=True))
    setup.c.stop = 1
    worker.join()
    data.close()
    setup.memory.close()
    if setup.c.bad or data.movers[0].counters.frames < setup.c.frames:
        raise SystemExit(f"{case}: {setup.c.bad} headers were wrong")
    return rate, share


def floor(driver: ctypes.CDLL, size: int, seconds: float) -> float:
    """Return the rate of the copies alone."""
    setup = Setup(Case("c", False, size))
    rate = driver.bench_floor(setup.memory.host, setup.c.pool_at, STRIDE, size, BUFFERS, seconds)
    setup.memory.close()
    return float(rate)


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--engine", action="append", choices=["c", "python"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    driver = build_driver()
    cases = [Case(e, p, s) for e in options.engine or ["c", "python"] for p in (False, True) for s in (64, 1500)]
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    dropped = dict.fromkeys(cases, 0)
    floors: dict[int, list[float]] = {64: [], 1500: []}
    for _ in range(options.rounds):
        for size, values in floors.items():
            values.append(floor(driver, size, options.seconds / 2))
        for case in cases:
            rate, share = measure(driver, case, options.seconds)
            if share >= FAIR_SHARE or case.engine == "python":
                rates[case].append(rate)
            else:
                dropped[case] += 1
    report(rates, dropped, floors, as_json=options.json)


def report(rates: dict[Case, list[float]], dropped: dict[Case, int], floors: dict[int, list[float]], *, as_json: bool) -> None:
    """Print medians, extremes, and the share of the copy's floor."""
    rows = []
    for case, values in rates.items():
        best = statistics.median(floors[case.size])
        row = {"case": str(case), "rounds": len(values), "dropped": dropped[case]}
        if values:
            median = statistics.median(values)
            row |= {"median": median, "min": min(values), "max": max(values), "of_floor": median / best}
        rows.append(row)
    if as_json:
        print(json.dumps({"floor": {s: statistics.median(v) for s, v in floors.items()}, "cases": rows}, indent=1))
        return
    for size, values in floors.items():
        print(f"copies alone    {size:5} B {statistics.median(values) / 1e6:8.2f} Mframes/s")
    for row in rows:
        if "median" in row:
            spread = f"({row['min'] / 1e6:.2f} to {row['max'] / 1e6:.2f})"
            print(
                f"{row['case']} {row['median'] / 1e6:8.2f} Mframes/s {spread:18} {row['of_floor']:6.1%} of the copies alone", end=""
            )
        else:
            print(f"{row['case']} no round with its processors", end="")
        print(f", {row['dropped']} of {row['rounds'] + row['dropped']} rounds dropped")


if __name__ == "__main__":
    main()
