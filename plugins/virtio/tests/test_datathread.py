"""The data thread: moves frames, sleeps when there are none, stands still on request, and is held up by nobody for long."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from pathlib import Path

import pytest
from mdevkit_virtio.datathread import DataThread
from mdevkit_virtio.driverside import Segment
from mdevkit_virtio.layout import NO_FEATURES, Feature, MoveOptions, Wait

SIZE = 100


class Link:
    """A loopback: a driver's two rings, the queues on them, and their eventfds."""

    def __init__(self, rig, features, num=16):
        self.rig = rig
        self.tx_ring, self.tx = rig.pair(num, features, name="tx")
        self.rx_ring, self.rx = rig.pair(num, features, name="rx")
        self.kicks = rig.eventfd(), rig.eventfd()
        self.call = rig.eventfd()
        self.tx.set_kick(self.kicks[0])
        self.rx.set_kick(self.kicks[1])
        self.rx.set_call(self.call)
        self.frame = rig.place(bytes(12) + b"x" * (SIZE - 12))
        self.mover = rig.engine.mover(self.tx.ring, self.rx.ring, MoveOptions())
        for _ in range(num):
            self.post()

    def post(self):
        assert self.rx_ring.add([], [Segment(self.rig.memory.allocate(SIZE), SIZE)], 0)
        if self.rx_ring.needs_kick():
            os.eventfd_write(self.kicks[1], 1)

    def send(self):
        assert self.tx_ring.add([Segment(self.frame, SIZE)], [], 0)
        if self.tx_ring.needs_kick():
            os.eventfd_write(self.kicks[0], 1)

    def came(self, count):
        """Wait for so many frames."""
        deadline = time.monotonic() + 20
        got = 0
        while got < count:
            got += len(self.rx_ring.collect())
            self.tx_ring.collect()
            assert time.monotonic() < deadline, f"{got} of {count} frames came"
            time.sleep(0)
        return got


def _until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def threads():
    made = []

    def make(engine, **options):
        made.append(DataThread("data", engine, **options))
        return made[-1]

    yield make
    for thread in made:
        thread.close()


@pytest.fixture
def link(rigs, engine, features):
    return Link(rigs(engine), features)


def test_frames_go_through_one_by_one_with_sleep_between(link, threads):
    thread = threads(link.rig.engine, spin_us=0)
    thread.set_movers([link.mover])
    thread.start()
    for number in range(16):
        _until(lambda number=number: thread.sleeps > number)
        link.send()
        link.came(1)
    assert link.tx.ring.kicks > 0


def test_signals_come(link, threads):
    link.rx_ring.want_signals(True)
    thread = threads(link.rig.engine)
    thread.set_movers([link.mover])
    thread.start()
    link.send()
    os.set_blocking(link.call, True)
    assert os.eventfd_read(link.call) >= 1
    link.came(1)


def test_no_kicks_are_asked_for_under_load(link, threads):
    thread = threads(link.rig.engine, spin_us=2_000_000)
    thread.set_movers([link.mover])
    thread.start()
    link.send()
    link.came(1)
    link.tx_ring.needs_kick()
    assert thread.sleeps == 0


def test_a_sleeping_thread_takes_no_processor_time(link, threads):
    thread = threads(link.rig.engine, spin_us=100)
    thread.set_movers([link.mover])
    thread.start()
    link.send()
    link.came(1)
    _until(lambda: thread.sleeps > 0)
    before = time.process_time()
    time.sleep(0.3)  # the time over which idleness is measured
    assert time.process_time() - before < 0.02


def test_without_room_it_sleeps_until_there_is_some(rigs, engine, features, threads):
    link = Link(rigs(engine), features, num=4)
    thread = threads(engine, spin_us=0)
    thread.set_movers([link.mover])
    thread.start()
    for _ in range(4):
        link.send()
    link.came(4)
    _until(lambda: link.tx_ring.collect() == [] and link.tx_ring.free == 4)
    for _ in range(4):
        link.send()
    _until(lambda: link.mover.wait is Wait.FULL)
    before = time.process_time()
    time.sleep(0.2)  # the time over which idleness is measured
    assert time.process_time() - before < 0.02
    for _ in range(4):
        link.post()
    link.came(4)
    assert link.mover.counters.dropped == 0


def test_too_few_buffers_for_a_frame_let_it_sleep_until_there_are_more(rigs, engine, features, threads):
    """A frame that needs five buffers finds one: that one is no reason to stay awake, and the driver is to kick for the next."""
    rig = rigs(engine)
    tx_ring, tx = rig.pair(16, features, name="tx")
    rx_ring, rx = rig.pair(16, features, name="rx")
    for queue in (tx, rx):
        queue.set_kick(rig.eventfd())

    def post():
        rx_ring.add([], [Segment(rig.memory.allocate(SIZE), SIZE)], 0)
        if rx_ring.needs_kick():
            os.eventfd_write(rx.ring.kick_fd, 1)

    post()
    tx_ring.add([Segment(rig.place(bytes(12) + b"x" * (4 * SIZE)), 12 + 4 * SIZE)], [], 0)
    thread = threads(rig.engine, spin_us=0)
    thread.set_movers([rig.engine.mover(tx.ring, rx.ring, MoveOptions(mergeable=True))])
    thread.start()
    _until(lambda: thread.sleeps)
    asleep, busy = thread.sleeps, time.process_time()
    time.sleep(0.2)  # the time over which idleness is measured
    assert thread.sleeps <= asleep + 1, "the kick of the first buffer may still wake it, nothing else"
    assert time.process_time() - busy < 0.02
    for _ in range(4):
        post()
    _until(lambda: rx_ring.collect())


def test_a_driver_without_kicks_is_polled(link, threads):
    link.tx.set_kick(-1)
    thread = threads(link.rig.engine, spin_us=0)
    thread.set_movers([link.mover])
    thread.start()
    link.tx_ring.add([Segment(link.frame, SIZE)], [], 0)
    link.came(1)
    before, start = thread.sleeps, time.monotonic()
    time.sleep(0.1)  # the time over which it is counted
    assert 0 < thread.sleeps - before <= 2000 * (time.monotonic() - start), "a thousand times a second"


def test_paused_means_that_nothing_moves(link, threads):
    thread = threads(link.rig.engine)
    thread.set_movers([link.mover])
    thread.start()
    for _ in range(50):
        with thread.paused(), thread.paused():
            before = bytes(link.rig.memory.map)
            link.mover.counters  # noqa: B018  # any thread may read them
            assert bytes(link.rig.memory.map) == before
    with thread.paused():
        link.send()
        time.sleep(0.02)  # long enough for a thread that does not stand still
        assert link.rx_ring.collect() == []
    link.came(1)


def test_many_threads_may_pause(link, threads):
    thread = threads(link.rig.engine)
    thread.set_movers([link.mover])
    thread.start()
    inside, most = [], []

    def pause():
        for _ in range(20):
            with thread.paused():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    pausers = [threading.Thread(target=pause) for _ in range(4)]
    for pauser in pausers:
        pauser.start()
    for pauser in pausers:
        pauser.join()
    assert set(most) == {1}
    link.send()
    link.came(1)


def test_stop_in_the_middle_of_traffic_and_go_on_elsewhere(link, threads):
    """A ring is taken over by another thread, with another queue object, without a frame lost or repeated."""
    packed = Feature.RING_PACKED in link.rig.ring().features or Feature.RING_PACKED in link.tx_ring.features
    total = 0
    for _ in range(6):
        thread = threads(link.rig.engine)
        thread.set_movers([link.mover])
        thread.start()
        for _ in range(5):
            link.send()
        thread.close()
        bases = [queue.stop().encode(packed=packed) for queue in (link.tx, link.rx)]
        for queue, ring, base in zip((link.tx, link.rx), (link.tx_ring, link.rx_ring), bases, strict=True):
            queue.start(link.rig.table, link.rig.config(ring, base=base))
        link.mover = link.rig.engine.mover(link.tx.ring, link.rx.ring, MoveOptions())
        while link.mover.move():
            pass
        got = len(link.rx_ring.collect())
        link.tx_ring.collect()
        total += got
        for _ in range(got):
            link.post()
    assert total == 30


def test_a_broken_ring_is_reported_and_the_others_go_on(rigs, engine, features, threads):
    good, bad = Link(rigs(engine), features), Link(rigs(engine), features)
    halted = []
    thread = threads(engine, on_halt=halted.append)
    thread.set_movers([bad.mover, good.mover])
    thread.start()
    bad.tx_ring.add([Segment(1 << 40, 100)], [], 0)
    os.eventfd_write(bad.kicks[0], 1)
    _until(lambda: halted)
    assert halted == [bad.mover]
    assert bad.tx.broken is not None
    for _ in range(10):
        good.send()
    good.came(10)
    assert halted == [bad.mover]


class Hasty:
    """An engine whose loops have been stopped before they begin, as by a pause that found the thread parked already."""

    def __init__(self, engine):
        self.engine = engine

    def loop(self, movers, **options):
        loop = self.engine.loop(movers, **options)
        loop.stop()
        return loop


def test_a_mover_that_halts_as_the_loop_is_stopped_is_reported(link, threads):
    halted = []
    thread = threads(Hasty(link.rig.engine), on_halt=halted.append)
    link.tx_ring.add([Segment(1 << 40, 100)], [], 0)
    thread.set_movers([link.mover])
    thread.start()
    _until(lambda: halted)
    with thread.paused(), thread.paused():
        assert halted == [link.mover]


def test_a_repaired_mover_is_moved_again(link, threads):
    halted = []
    thread = threads(link.rig.engine, on_halt=halted.append)
    thread.set_movers([link.mover])
    thread.start()
    link.tx_ring.add([Segment(1 << 40, 100)], [], "bad")
    os.eventfd_write(link.kicks[0], 1)
    _until(lambda: halted)
    with thread.paused():
        ring = link.rig.ring(16, link.tx_ring.features)
        link.tx.stop()
        link.tx.start(link.rig.table, link.rig.config(ring))
        link.tx_ring = ring
        thread.set_movers([link.rig.engine.mover(link.tx.ring, link.rx.ring, MoveOptions())])
    link.send()
    link.came(1)


def test_a_client_that_fills_its_eventfd_does_not_keep_the_thread(link, threads):
    """It blocks the write that signals it; pausing frees the thread."""
    call = os.eventfd(0, os.EFD_CLOEXEC)
    link.rig.eventfds.append(call)
    link.rx.set_call(call)
    link.rx_ring.want_signals(True)
    stop = threading.Event()

    def fill():
        while not stop.is_set():
            with contextlib.suppress(BlockingIOError):
                os.preadv(call, [bytearray(8)], -1, os.RWF_NOWAIT)
            os.set_blocking(call, False)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(call, (1 << 64) - 2)
            os.set_blocking(call, True)

    filler = threading.Thread(target=fill)
    filler.start()
    thread = threads(link.rig.engine)
    thread.set_movers([link.mover])
    thread.start()
    started = time.monotonic()
    for _ in range(16):
        link.send()
        with thread.paused():
            pass
    assert time.monotonic() - started < 15
    stop.set()
    filler.join()


def test_closing_is_final_and_harmless_twice(link, threads):
    gc.collect()
    before = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # of descriptors, not of files
    thread = DataThread("data", link.rig.engine)
    thread.set_movers([link.mover])
    thread.start()
    thread.close()
    thread.close()
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208  # as above


def test_a_bug_in_the_engine_halts_the_movers(rigs, threads, caplog):
    """Whatever happens on the data thread, its owner hears of it."""
    from mdevkit_virtio.engine import load

    link = Link(rigs(load("python")), Feature(0))
    halted = []
    thread = threads(link.rig.engine, on_halt=halted.append)
    link.mover.tx.avail = None
    thread.set_movers([link.mover])
    thread.start()
    _until(lambda: halted)
    assert "the engine failed, its queues are halted" in caplog.text


def test_a_stop_that_is_interrupted_leaves_the_thread_asleep(rig, threads, monkeypatch):
    """A stop has two halves; between them a thread that polls may have stopped already."""
    link = Link(rig, NO_FEATURES)
    thread = threads(link.rig.engine, spin_us=100_000)
    thread.set_movers([link.mover])
    thread.start()
    link.send()
    link.came(1)
    write = os.eventfd_write

    def slow(fd, value):
        time.sleep(0.05)  # what another process on this processor may take
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", slow)
    with thread.paused():
        monkeypatch.undo()
        slept = thread.sleeps
    _until(lambda: thread.sleeps > slept)
    schedstat = Path(f"/proc/self/task/{thread.native_id}/schedstat")

    def used():
        before = int(schedstat.read_text().split()[0])
        time.sleep(0.5)  # what is measured is the processor time of a while
        return int(schedstat.read_text().split()[0]) - before

    # A kick from before the pause may wake it once more, for one round of polling.
    assert min(used(), used()) < 50_000_000
