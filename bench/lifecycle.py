"""What creating and removing a device costs core while others live, and what a device weighs.

    python bench/lifecycle.py

Every number of live devices is measured in a process of its own, alternately, so that neither the garbage collector's work on
the others nor a change of the machine's speed is counted for it. The vendor, the bus and the driver do nothing: what is
measured is core. Costs must not grow with the number of devices: the ratio to ten live devices is printed, 1.3 is the limit.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING

from mdevkit import Bus, Driver, MdevType, ParentOps, Pool, Registry, hookimpl

if TYPE_CHECKING:
    from mdevkit import Device, Mdev

LIVE = (10, 1_000, 10_000)
ROUNDS = 7
PAIRS = 2_000


class NullBus(Bus):
    name = "null"


class NullDriver(Driver):
    name, bus, id_table = "null_driver", "null", ("c01",)

    @hookimpl
    def driver_probe(self, device: Device) -> None: ...

    @hookimpl
    def driver_remove(self, device: Device) -> None: ...


class NullCard(ParentOps):
    name = "null_card"

    def __init__(self) -> None:
        self.types = [MdevType("1", "null", "vfio-pci", costs={Pool("slots", 1_000_000): 1})]

    @hookimpl
    def parent_create(self, mdev: Mdev) -> None:
        mdev._set_class(1, self)

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None: ...


def pairs(registry: Registry, count: int) -> list[float]:
    """Create and remove a device `count` times; return the seconds each pair took."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        registry.remove(registry.create("null_card-1").uuid)
        taken.append(time.perf_counter() - start)
    return taken


def measure(live: int) -> dict[str, float]:
    """Return microseconds per create and remove with `live` devices there: the median, and the mean with all that is rare in it."""
    with Registry([NullBus(), NullDriver(), NullCard()]) as registry:
        for _ in range(live):
            registry.create("null_card-1")
        pairs(registry, PAIRS // 4)
        taken = pairs(registry, PAIRS)
    return {"median": statistics.median(taken) * 1e6, "mean": statistics.fmean(taken) * 1e6}


def weigh(count: int) -> dict[str, float]:
    """Return the bytes a device takes, once the ring of events is full."""
    with Registry([NullBus(), NullDriver(), NullCard()]) as registry:
        pairs(registry, 2_000)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(count):
            registry.create("null_card-1")
        after, _ = tracemalloc.get_traced_memory()
    return {"bytes": (after - before) / count}


def child(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def main() -> None:
    found: dict[int, list[dict[str, float]]] = {live: [] for live in LIVE}
    for _ in range(ROUNDS):
        for live in LIVE:
            found[live].append(child("measure", str(live)))
    print(f"create + remove, us per device ({ROUNDS} processes of {PAIRS} pairs each; median of medians, median of means)")
    first = None
    for live, answers in found.items():
        median, mean = (statistics.median(answer[what] for answer in answers) for what in ("median", "mean"))
        first = first or (median, mean)
        spread = max(answer["median"] for answer in answers) / min(answer["median"] for answer in answers)
        ratios = f"ratio to {LIVE[0]}: {median / first[0]:.2f} (mean {mean / first[1]:.2f}; at most 1.30)"
        print(f"  {live:>6} live: {median:7.1f}  mean {mean:7.1f}  {ratios}  spread {spread:.2f}")
    print(f"memory per device: {child('weigh', '10000')['bytes']:.0f} bytes")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps({"measure": measure, "weigh": weigh}[sys.argv[1]](int(sys.argv[2]))))
    else:
        main()
