"""Fixtures of the virtio tests: each test of a ring runs on every engine there is, and in every format that matters."""

from __future__ import annotations

import importlib.util
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from mdevkit import MdevType, ParentOps, Registry, hookimpl
from mdevkit_virtio import access
from mdevkit_virtio.bus import ClassId, VirtioMdevBus
from mdevkit_virtio.config import ConfigSpace, Field
from mdevkit_virtio.driverside import GuestMemory, make_driver_ring
from mdevkit_virtio.engine import VARIABLE, load
from mdevkit_virtio.layout import NO_FEATURES, Feature, MoveOptions
from mdevkit_virtio.memory import MemoryTable, Region
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.queue import QueueConfig, Virtqueue
from mdevkit_virtio.transport import VirtioMdevDriver
from mdevkit_virtio.virtio.bus import VirtioBus
from mdevkit_virtio.virtio.net import VirtioNetDriver
from mdevkit_virtio.workers import BufferWorker, MoverWorker

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


@pytest.fixture(scope="session", autouse=True)
def own_files():
    """Open what the Python engine keeps open, before anybody counts descriptors."""
    access.open_files()


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


MAC = bytes.fromhex("020000000042")
F_MTU, F_MAC, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_MQ, F_PLATFORM = 3, 5, 15, 16, 17, 22, 33
NET_FEATURES = Feature.VERSION_1 | 1 << F_MTU | 1 << F_MAC | 1 << F_STATUS


class LoopNet(VirtioModel):
    """A network device that sends back what it gets: one mover per queue pair, and a control queue where it offers one."""

    device_id = 1

    def __init__(self, features=NET_FEATURES, *, name, pairs=1, num=64, mtu=1500, engine=None):
        fields = [Field("mac", 0, 6), Field("status", 6, 2), Field("pairs", 8, 2), Field("mtu", 10, 2)]
        self.pairs, self.active = pairs, 1
        queues = [num] * (2 * pairs) + [8] * bool(features >> F_CTRL_VQ & 1)
        super().__init__(queues, int(features), ConfigSpace(fields), name=name, engine=engine)
        self.config.update(mac=MAC, status=1, pairs=pairs, mtu=mtu)

    def make_workers(self):
        workers = [self._mover(pair) for pair in range(self.pairs)]
        if self.features >> F_CTRL_VQ & 1:
            workers.append(BufferWorker(f"{self.name} control", [2 * self.pairs], self.queue_broke, self._control))
        self.movers = workers[: self.pairs]
        return workers

    def _mover(self, pair):
        rx, tx = 2 * pair, 2 * pair + 1

        def make(queues):
            if rx not in queues or tx not in queues:
                return []
            options = MoveOptions(mergeable=bool(self.accepted & Feature.NET_MRG_RXBUF))
            return [self.engine.mover(queues[tx].ring, queues[rx].ring, options)]

        return MoverWorker(f"{self.name} {pair}", [rx, tx], self.queue_broke, engine=self.engine, make_movers=make)

    def _control(self, index, queue):
        for buffer in queue.take():
            group, command, low, high = buffer.read()
            self.active = low | high << 8
            buffer.write(bytes([(group, command) != (4, 0) or not 1 <= self.active <= self.pairs]))
            queue.complete((buffer, 1))


class Recorder:
    """Stands before a device's ops and notes the calls a driver makes; `refuse` maps an op to the error it raises."""

    def __init__(self, ops):
        self.ops, self.calls, self.refuse = ops, [], {}

    def __getattr__(self, name):
        function = getattr(self.ops, name)
        if not callable(function) or name == "close":
            return function

        def call(*arguments):
            # Not the memory itself, which would live as long as the note of it.
            self.calls.append((name,) if name == "set_map" else (name, *arguments))
            if name in self.refuse:
                raise self.refuse[name]
            return function(*arguments)

        return call


class LoopParent(ParentOps):
    """Makes devices of what ``make(name)`` returns; by default `LoopNet`."""

    name = "loop"

    def __init__(self):
        self.types = [
            MdevType("virtio", VirtioMdevBus.name, "virtio_mdev"),
            MdevType("vhost", VirtioMdevBus.name, "vhost_mdev"),
        ]
        self.make = lambda name: LoopNet(name=name)
        #: What each new device refuses: see `Recorder`.
        self.refuse = {}

    @hookimpl
    def parent_create(self, mdev, params):
        mdev.drvdata = Recorder(self.make(f"loop {mdev.name[:8]}"))
        mdev.drvdata.refuse.update(self.refuse)
        mdev.set_ops(ClassId.VIRTIO if mdev.type.group == "virtio" else ClassId.VHOST, mdev.drvdata)

    @hookimpl
    def parent_remove(self, mdev):
        mdev.drvdata.ops.close()


class Lab:
    """A registry with the loop parent and the drivers of this package. `loop` makes the device of that parent."""

    loop = LoopNet

    def __init__(self, folder, *plugins):
        self.folder = folder
        self.number = -1
        self.parent = LoopParent()
        known = [VirtioMdevBus(), VirtioBus(), VirtioMdevDriver(), VirtioNetDriver()]
        self.registry = Registry([self.parent, *(plugins or known)])

    def create(self, make=None, **more):
        """Return a mediated device, whose ops and notes are its ``drvdata``."""
        if make is not None:
            self.parent.make = make
        self.number += 1
        return self.registry.create("loop-virtio", endpoint_path=f"{self.folder}/{self.number}.sock", **more)

    def netdev(self, features=NET_FEATURES, **more):
        """Return a netdev of a new device."""
        mdev = self.create(lambda name: LoopNet(features, name=name, **more))
        return mdev.endpoint.device.endpoint.netdev


def _held():
    """Return what this process holds and nobody but us could close: threads, and descriptors other than those of memory."""
    names = [(str(fd), str(fd.readlink())) for fd in Path("/proc/self/fd").iterdir() if os.path.lexists(fd)]
    return Counter(entry for entry in names if "/memfd:" not in entry[1]) + Counter(thread.name for thread in threading.enumerate())


@pytest.fixture
def labs():
    """Makes labs: ``labs()``, or with the plugins wanted."""
    before = _held()
    with ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="mdk"))

        def make(*plugins):
            made = Lab(Path(folder), *plugins)
            undo.enter_context(made.registry)
            return made

        yield make
    # What tests before left may end meanwhile.
    assert not _held() - before


@pytest.fixture
def lab(labs):
    return labs()


@pytest.fixture
def wait_until():
    """Polls for what nobody tells us of: ``wait_until(true)``."""

    def wait(true, seconds=20.0):
        deadline = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
            time.sleep(0.002)
        return found

    return wait


@pytest.fixture
def exhausted():
    """Keeps this process from opening anything: ``with exhausted(): ...``."""

    @contextmanager
    def block():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)

    return block
