"""Both engines do the same on the same rings, however hostile, and touch nothing outside the memory table.

Two worlds start with equal memory; the same things happen to both, one with each engine. After every step results, faults,
positions and every byte of memory must agree, and what is not in the table must be as it was.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import threading
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mdevkit_virtio.engine import load
from mdevkit_virtio.layout import Areas, Desc, Fault, Feature, MoveOptions, RingSetup, Used, VringBase, Wait
from mdevkit_virtio.memory import DirtyLog, MemoryTable, Region

FILE = 0x10000
CANARY = 0xC5
LOG = 64
#: (guest address, size, file offset): two that adjoin for the guest but not in the file, and one with a ragged end.
REGIONS = ((0x1000, 0x4000, 0x1000), (0x5000, 0x2000, 0x9000), (0x20000, 0xFF0, 0xC000))
RINGS = (0x1000, 0x2000)
TABLES = 0x3000
BUFFERS = 0x4000

FLAGS = [0, Desc.NEXT, Desc.WRITE, Desc.NEXT | Desc.WRITE, Desc.INDIRECT, Desc.INDIRECT | Desc.NEXT, Desc.INDIRECT | Desc.WRITE]
LENGTHS = [0, 1, 11, 12, 13, 16, 32, 64, 80, 96, 256, 0x1000, 0x2000, 0x3000, 0x7FFFFFFF, 0xFFFFFFFF]
EDGES = [0, 0xFFF, 0x4FF8, 0x6FF0, 0x6FFF, 0x7000, 0x20000, 0x20FE8, 0x20FF0, (1 << 63), (1 << 64) - 32, (1 << 64) - 1]

addresses = st.one_of(
    st.integers(BUFFERS, BUFFERS + 0x2F00),
    st.integers(0, 12).map(lambda i: TABLES + 16 * i),
    st.sampled_from([*RINGS, RINGS[0] + 16, RINGS[0] + 0x400]),
    st.sampled_from(EDGES),
)
descriptors = st.tuples(addresses, st.sampled_from(LENGTHS), st.sampled_from(FLAGS).map(int), st.integers(0, 17))
parts = st.tuples(st.integers(BUFFERS, BUFFERS + 0x2F00), st.integers(1, 300))
headers = st.sampled_from([10, 12])
rings = st.integers(0, 1)
slots = st.integers(0, 15)

steps = st.one_of(
    st.tuples(st.just("chain"), rings, st.lists(descriptors, min_size=1, max_size=5)),
    st.tuples(
        st.just("frame"), rings, st.lists(st.tuples(st.integers(BUFFERS, BUFFERS + 0x2F00), st.integers(1, 300)), max_size=4)
    ),
    st.tuples(st.just("desc"), rings, slots, descriptors),
    st.tuples(st.just("table"), st.integers(0, 15), descriptors),
    st.tuples(st.just("index"), rings, st.one_of(st.integers(0, 0xFFFF), st.integers(0, 40))),
    st.tuples(st.just("event"), rings, st.integers(0, 0xFFFF), st.integers(0, 3)),
    st.tuples(st.just("take"), rings, st.integers(0, 70)),
    st.tuples(st.just("complete"), rings, st.integers(0, 5), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("notify"), rings, st.booleans()),
    st.tuples(st.just("move"), st.integers(0, 70)),
    st.tuples(st.just("move"), st.integers(0, 70)),
    st.tuples(st.just("restart"), rings),
)


class World:
    """Memory, two rings on it, and a mover from the first to the second."""

    def __init__(self, engine, num, features, options, *, overlap=False):
        self.engine = load(engine)
        self.packed = Feature.RING_PACKED in features
        self.num, self.features, self.options = num, features, options
        self.fd = os.memfd_create("world")
        os.pwrite(self.fd, bytes([CANARY]) * FILE, 0)
        self.log_fd = os.memfd_create("log")
        os.ftruncate(self.log_fd, LOG)
        self.table = MemoryTable(Region(self.fd, guest, size, offset=offset) for guest, size, offset in REGIONS)
        self.log = DirtyLog(self.log_fd, LOG)
        for guest, size, _ in REGIONS:
            self.poke(guest, bytes(size))
        self.outstanding = ([], [])
        self.heads = [0, 0]
        self.overlap = overlap
        self.rings = [self._start(i, VringBase()) for i in range(2)]
        self._make_mover()

    def close(self):
        os.close(self.fd)
        os.close(self.log_fd)

    def _areas(self, which):
        desc = RINGS[which]
        driver, device = (desc + 8, desc + 16) if self.overlap else (desc + 0x400, desc + 0x600)
        return Areas(*(self.table.contiguous(at, 256) for at in (desc, driver, device)))

    def _start(self, which, base):
        return self.engine.ring(RingSetup(self.table, self._areas(which), self.num, self.features, base, self.log, log_ring=True))

    def _make_mover(self):
        self.mover = self.engine.mover(self.rings[0], self.rings[1], self.options)

    def poke(self, guest, data):
        start, _, offset = next(r for r in REGIONS if r[0] <= guest < r[0] + r[1])
        os.pwrite(self.fd, data, offset + guest - start)

    def memory(self):
        return os.pread(self.fd, FILE, 0), os.pread(self.log_fd, LOG, 0)

    def put(self, which, slot, desc, *, available=None):
        """Write a descriptor; in a packed ring `available` says with which wrap counter it is offered."""
        address, length, flags, following = desc
        if self.packed:
            flags |= 0 if available is None else int(Desc.AVAIL if available else Desc.USED)
            entry = struct.pack("<QIHH", address, length, following, flags)
        else:
            entry = struct.pack("<QIHH", address, length, flags, following)
        self.poke(RINGS[which] + 16 * (slot % self.num), entry)

    # -- steps, each of which returns what both engines must agree on ----------------------------------------------------

    def chain(self, which, entries):
        base = self.rings[which].base
        if self.packed:
            for i, entry in enumerate(entries):
                at = base.avail + i
                self.put(which, at, entry, available=base.avail_wrap != (at >= self.num))
            return
        head = self.heads[which] % self.num
        self.heads[which] += len(entries)
        for i, entry in enumerate(entries):
            self.put(which, head + i, (*entry[:3], (head + i + 1) % self.num))
        self.poke(RINGS[which] + 0x404 + 2 * (base.avail % self.num), struct.pack("<H", head))
        self.poke(RINGS[which] + 0x402, struct.pack("<H", (base.avail + 1) & 0xFFFF))

    def frame(self, which, parts):
        write = int(Desc.WRITE) if which else 0
        last = len(parts) - 1
        if parts:
            self.chain(which, [(at, size, write | (int(Desc.NEXT) if i < last else 0), 0) for i, (at, size) in enumerate(parts)])

    def desc(self, which, slot, entry):
        self.put(which, slot, entry, available=self.rings[which].base.avail_wrap)

    def table_(self, slot, entry):
        self.poke(TABLES + 16 * slot, struct.pack("<QIHH", *entry))

    def index(self, which, value):
        self.poke(RINGS[which] + 0x402, struct.pack("<H", value))

    def event(self, which, where, flags):
        self.poke(RINGS[which] + 0x400, struct.pack("<H", where if self.packed else flags))
        self.poke(
            RINGS[which] + (0x402 if self.packed else 0x404 + 2 * self.num), struct.pack("<H", flags if self.packed else where)
        )

    def take(self, which, limit):
        chains = self.rings[which].take(limit)
        self.outstanding[which].extend(chains)
        return [
            (
                c.id,
                c.slots,
                c.readable,
                c.writable,
                [(p.guest, p.length) for p in c.inputs],
                [(p.guest, p.length) for p in c.outputs],
            )
            for c in chains
        ]

    def complete(self, which, count, length):
        done, self.outstanding[which][:] = self.outstanding[which][:count], self.outstanding[which][count:]
        return self.rings[which].complete([Used(c.id, length, c.slots) for c in done])

    def notify(self, which, wanted):
        return self.rings[which].notify(wanted)

    def move(self, limit):
        moved = self.mover.move(limit)
        return moved, self.mover.wait

    def restart(self, which):
        base = self.rings[which].base
        self.outstanding[which].clear()
        self.rings[which] = self._start(which, VringBase(base.used, base.used, base.used_wrap, base.used_wrap))
        self._make_mover()

    def do(self, step):
        name, *arguments = step
        result = getattr(self, "table_" if name == "table" else name)(*arguments)
        state = [(r.fault, r.fault_value, r.base, r.inflight, r.calls) for r in self.rings]
        return result, state, self.mover.counters

    def assert_nothing_outside_changed(self):
        data = self.memory()[0]
        inside = bytearray(FILE)
        for _, size, offset in REGIONS:
            inside[offset : offset + size] = b"\1" * size
        assert all(known or byte == CANARY for known, byte in zip(inside, data, strict=True))


@contextlib.contextmanager
def _worlds(engines, *arguments, **more):
    worlds = [World(engine, *arguments, **more) for engine in engines]
    try:
        yield worlds
    finally:
        for world in worlds:
            world.close()


features = st.sampled_from([Feature.RING_PACKED, Feature(0)]).flatmap(
    lambda packed: st.sets(st.sampled_from([Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.IN_ORDER])).map(
        lambda more: sum(more, packed)
    )
)
setups = st.tuples(
    st.sampled_from([2, 4, 8, 16]),
    features.map(Feature),
    st.one_of(
        st.builds(MoveOptions, tx_header=headers, rx_header=headers, drop=st.booleans(), keep_header=st.booleans()),
        st.builds(MoveOptions, tx_header=headers, mergeable=st.just(True), drop=st.booleans(), keep_header=st.booleans()),
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(setup=setups, overlap=st.booleans(), script=st.lists(steps, min_size=1, max_size=25))
def test_the_same_rings_give_the_same_results(c_engine, setup, overlap, script):
    with _worlds(("python", c_engine.name), *setup, overlap=overlap) as (reference, native):
        for step in script:
            assert reference.do(step) == native.do(step), step
            assert reference.memory() == native.memory(), step
        native.assert_nothing_outside_changed()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(setup=setups, frames=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7), st.integers(1, 300)), min_size=1, max_size=40))
def test_the_same_frames_are_moved(c_engine, setup, frames):
    """Sent frames and receive buffers of any size and cut, each with memory of its own."""
    with _worlds(("python", c_engine.name), *setup) as (reference, native):
        for number, (kind, cuts, size) in enumerate(frames):
            at = BUFFERS + 300 * (number % 39)
            edges = sorted({0, size, *(size * i // (cuts + 1) for i in range(cuts + 1))})
            parts = [(at + a, b - a) for a, b in pairwise(edges)]
            step = ("move", size) if kind == 2 else ("frame", kind, parts[: setup[0]])
            for world in (reference, native):
                if kind == 0:
                    world.poke(at, random.Random(number).randbytes(size))
            assert reference.do(step) == native.do(step), step
            assert reference.memory() == native.memory(), step


@pytest.mark.parametrize("name", ["python", "c"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(setup=setups, script=st.lists(steps, min_size=1, max_size=25))
def test_areas_that_overlap_hurt_nobody(request, name, setup, script):
    if name == "c":
        request.getfixturevalue("c_engine")
    with _worlds((name,), *setup, overlap=True) as (world,):
        for step in script:
            world.do(step)
        world.assert_nothing_outside_changed()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["python", "c"])
def test_rings_rewritten_while_they_are_read(request, name, packed):
    """A driver that changes descriptors and indexes at the same moment can break its rings and nothing else."""
    if name == "c":
        request.getfixturevalue("c_engine")
    features = Feature.INDIRECT_DESC | (Feature.RING_PACKED if packed else Feature(0))
    rng = random.Random(11)
    with _worlds((name,), 8, features, MoveOptions(mergeable=True)) as (world,):
        stop = threading.Event()
        hostile = threading.Thread(target=_rewrite, args=(world, stop))
        hostile.start()
        moved, faults = 0, set()
        for number in range(4000):
            for which in (0, 1):
                world.frame(which, [(BUFFERS + rng.randrange(0x2000), rng.randrange(1, 300))])
            moved += world.mover.move()
            faults |= {ring.fault for ring in world.rings}
            for which in (0, 1):
                if world.rings[which].fault or number % 50 == 0:
                    world.restart(which)
        stop.set()
        hostile.join()
        world.assert_nothing_outside_changed()
    assert moved > 100
    assert len(faults) > 2, "the hostile thread was never in the way"


def _rewrite(world, stop):
    rng = random.Random(3)
    while not stop.is_set():
        which = rng.randrange(2)
        entry = (rng.choice([*EDGES, BUFFERS, TABLES, RINGS[0]]), rng.choice(LENGTHS), int(rng.choice(FLAGS)), rng.randrange(18))
        world.put(which, rng.randrange(8), entry, available=rng.random() < 0.5)
        if not world.packed and rng.random() < 0.1:
            world.index(which, rng.randrange(0x10000))


def test_faults_and_waits_have_the_numbers_of_the_c_code(c_engine):
    from mdevkit_virtio.engine.native import lib

    assert {f: getattr(lib, f"MV_{f.name}") for f in Fault} == {f: f.value for f in Fault}
    assert {w: getattr(lib, f"MV_{w.name}") for w in Wait} == {w: w.value for w in Wait}
