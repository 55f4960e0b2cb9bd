"""Fixtures of the virtio tests: each test of a ring runs on every engine there is, and in every format that matters."""

from __future__ import annotations

import importlib.util
import os

import pytest
from mdevkit_virtio.driverside import GuestMemory, make_driver_ring
from mdevkit_virtio.engine import VARIABLE, load
from mdevkit_virtio.layout import NO_FEATURES, Feature
from mdevkit_virtio.memory import MemoryTable, Region
from mdevkit_virtio.queue import QueueConfig, Virtqueue

HAVE_C = os.environ.get(VARIABLE) != "python" and importlib.util.find_spec("mdevkit_virtio.engine._native") is not None
NEEDS_C = pytest.mark.skipif(not HAVE_C, reason="the C engine is not built: python -m mdevkit_virtio.engine.build")
ENGINES = [pytest.param("python"), pytest.param("c", marks=NEEDS_C)] if os.environ.get(VARIABLE) != "python" else ["python"]
FORMATS = {
    "split": NO_FEATURES,
    "packed": Feature.RING_PACKED,
    "split-event": Feature.EVENT_IDX | Feature.INDIRECT_DESC,
    "packed-event": Feature.RING_PACKED | Feature.EVENT_IDX | Feature.INDIRECT_DESC,
    "packed-in-order": Feature.RING_PACKED | Feature.IN_ORDER,
}


@pytest.fixture(params=ENGINES)
def engine(request):
    return load(request.param)


@pytest.fixture
def c_engine():
    if not HAVE_C:
        pytest.skip("the C engine is not built: python -m mdevkit_virtio.engine.build")
    return load("c")


@pytest.fixture(params=FORMATS)
def features(request):
    return FORMATS[request.param]


class Rig:
    """Guest memory, rings of its driver, and the queues of a device on them."""

    def __init__(self, engine, size=1 << 20, *, sealed=True):
        self.engine = engine
        self.memory = GuestMemory(size, sealed=sealed)
        self.table = MemoryTable([Region(self.memory.fd, 0, size)])
        self.eventfds = []

    def ring(self, num=16, features=NO_FEATURES):
        return make_driver_ring(self.memory, num, features)

    def config(self, ring, **more):
        return QueueConfig(ring.num, ring.desc, ring.driver, ring.device, ring.features, **more)

    def queue(self, ring, *, name="queue 0", table=None, **more):
        queue = Virtqueue(name, self.engine)
        queue.start(table or self.table, self.config(ring, **more))
        return queue

    def pair(self, num=16, features=NO_FEATURES, **more):
        """Return a driver's ring and the device's queue on it."""
        ring = self.ring(num, features)
        return ring, self.queue(ring, **more)

    def place(self, data):
        """Return the guest address of a copy of `data`."""
        at = self.memory.allocate(max(len(data), 1))
        self.memory.map[at : at + len(data)] = data
        return at

    def look(self, at, size):
        return self.memory.map[at : at + size]

    def poke(self, at, data):
        self.memory.map[at : at + len(data)] = data

    def eventfd(self):
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.eventfds.append(fd)
        return fd

    def close(self):
        self.memory.close()
        for fd in self.eventfds:
            os.close(fd)


@pytest.fixture
def rigs():
    """Makes rigs: ``rigs(engine)``."""
    made = []

    def make(engine, *arguments, **more):
        made.append(Rig(engine, *arguments, **more))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(rigs, engine):
    return rigs(engine)
