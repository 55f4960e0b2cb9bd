"""Frames from a transmit queue to a receive queue: headers, merging, waiting, dropping, the dirty log."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import ExitStack
from itertools import pairwise

import pytest
from mdevkit_virtio.driverside import Segment
from mdevkit_virtio.layout import MAX_BURST, NO_FEATURES, Fault, Feature, MoveCounters, MoveOptions, RingError, Wait
from mdevkit_virtio.memory import DirtyLog

ZERO = bytes(10)
PAGE = 4096


class Net:
    """A device with a transmit and a receive queue, and their driver. The transmit rig may be another client's."""

    def __init__(self, rig, features, options=MoveOptions(), *, num=16, other=None):  # noqa: B008  # immutable
        self.rig = rig
        self.source = other or rig
        self.tx_ring, self.tx = self.source.pair(num, features, name="tx")
        self.rx_ring, self.rx = rig.pair(num, features, name="rx")
        self.options = options
        self.mover = rig.engine.mover(self.tx.ring, self.rx.ring, options)

    def send(self, frame, *, header=None, cuts=(), token=None):
        data = (bytes(self.options.tx_header) if header is None else header) + frame
        bounds = [0, *cuts, len(data)]
        segments = [Segment(self.source.place(data[a:b]), b - a) for a, b in pairwise(bounds)]
        assert self.tx_ring.add(segments, [], token)

    def post(self, *sizes):
        """Make one receive buffer of these segments available."""
        segments = [Segment(self.rig.place(b"\xee" * size), size) for size in sizes]
        assert self.rx_ring.add([], segments, segments)

    def received(self):
        """Return the bytes that came, one item a buffer."""
        result = []
        for segments, length in self.rx_ring.collect():
            data = b"".join(self.rig.look(*segment) for segment in segments)
            assert data[length:].strip(b"\xee") == b"", "nothing is written beyond the length told"
            result.append(data[:length])
        return result


@pytest.fixture
def net(rig, features):
    return Net(rig, features)


def _frame(size, seed=0):
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 32, 33, 60, 63, 64, 65, 127, 128, 129, 1500, 9000])
def test_a_frame_arrives_behind_a_fresh_header(net, size):
    net.send(_frame(size), header=b"\xff" * 12, token="tx")
    net.post(size + 12)
    assert net.mover.move() == 1
    assert net.received() == [ZERO + b"\1\0" + _frame(size)]
    assert net.tx_ring.collect() == [("tx", 0)]
    assert net.mover.counters == MoveCounters(1, size, 0, 0, 0)


@pytest.mark.parametrize("size", [511, 512, 513, 575, 576, 577, 1514])
def test_large_frames_at_every_alignment(net, size):
    memory, frame = net.rig.memory, _frame(size)
    source, target = memory.allocate(size + 128), memory.allocate(size + 128)
    for shift in range(64):
        start, place = source + shift, target + (shift * 37) % 64
        memory.map[start : start + 12 + size] = bytes(12) + frame
        memory.map[target : target + size + 128] = b"\xee" * (size + 128)
        net.tx_ring.add([Segment(start, 12 + size)], [], None)
        net.rx_ring.add([], [Segment(place, 12 + size)], None)
        assert net.mover.move() == 1
        net.tx_ring.collect()
        net.rx_ring.collect()
        around = memory.map[target : target + size + 128]
        assert around == (b"\xee" * (place - target) + ZERO + b"\1\0" + frame).ljust(size + 128, b"\xee")


@pytest.mark.parametrize("distance", [-1499, -64, -63, -1, 1, 63, 64, 1499])
def test_a_driver_may_have_its_frame_written_over_itself(net, distance):
    """Wherever the two buffers overlap, the frame that comes is the one that was sent."""
    memory, frame = net.rig.memory, _frame(1500)
    start = memory.allocate(8192) + 2000
    memory.map[start : start + 1512] = ZERO + b"\1\0" + frame
    net.tx_ring.add([Segment(start, 1512)], [], None)
    net.rx_ring.add([], [Segment(memory.allocate(12), 12), Segment(start + 12 + distance, 1500)], None)
    assert net.mover.move() == 1
    assert memory.map[start + 12 + distance : start + 1512 + distance] == frame


def test_header_and_frame_may_be_cut_anywhere(net):
    for cut in range(1, 40):
        net.send(_frame(40), cuts=(cut,))
        net.post(*([cut, 52 - cut] if cut % 2 else [52]))
        assert net.mover.move() == 1
        net.tx_ring.collect()
        assert net.received() == [ZERO + b"\1\0" + _frame(40)]


def test_many_tiny_pieces(rig):
    net = Net(rig, Feature(0), num=64)
    net.send(_frame(30), cuts=range(1, 42))
    net.post(*[1] * 42)
    net.mover.move()
    assert net.received() == [ZERO + b"\1\0" + _frame(30)]


@pytest.mark.parametrize("options", [{"tx_header": 11}, {"rx_header": 0}, {"rx_header": 10, "mergeable": True}])
def test_headers_there_are_none_of(options):
    with pytest.raises(ValueError, match="bytes, mergeable"):
        MoveOptions(**options)


def test_headers_of_ten_bytes(rig, features):
    net = Net(rig, features, MoveOptions(tx_header=10, rx_header=10))
    net.send(_frame(20))
    net.post(100)
    net.mover.move()
    assert net.received() == [ZERO + _frame(20)]


def test_sides_with_different_headers(rig, features):
    net = Net(rig, features, MoveOptions(tx_header=10, rx_header=12))
    net.send(_frame(20))
    net.post(100)
    net.mover.move()
    assert net.received() == [ZERO + b"\1\0" + _frame(20)]


def test_a_header_that_is_kept(rig, features):
    net = Net(rig, features, MoveOptions(keep_header=True))
    net.send(_frame(20), header=b"0123456789\x77\x77", cuts=(3,))
    net.post(100)
    net.mover.move()
    assert net.received() == [b"0123456789\1\0" + _frame(20)]


def test_a_large_frame_is_spread_over_mergeable_buffers(rig, features):
    net = Net(rig, features, MoveOptions(mergeable=True))
    for _ in range(5):
        net.post(5, 6, 89)
    net.send(_frame(250))
    net.send(_frame(88, 1))
    assert net.mover.move() == 2
    first, *rest = net.received()
    assert first[:12] == ZERO + b"\3\0"
    assert b"".join([first[12:], *rest[:2]]) == _frame(250)
    assert rest[2:] == [ZERO + b"\1\0" + _frame(88, 1)]


WATCH = """
import mmap, sys
fd, at, end = map(int, sys.argv[1:])
indexes = memoryview(mmap.mmap(fd, 0)).cast("H")
print("watching", flush=True)
seen = {0}
while end not in seen:
    seen.add(indexes[at // 2])
print(*sorted(index for index in seen if index % 7))
"""


@pytest.mark.parametrize("features", [NO_FEATURES, Feature.EVENT_IDX], ids=["split", "split-event"])
def test_the_buffers_of_a_frame_come_back_together(rig, features):
    """A driver that looks at the wrong moment sees all of them or none (5.1.6.4.1): one of seven is no frame, and is lost."""
    net, rounds = Net(rig, features, MoveOptions(mergeable=True)), 500
    sizes = rig.memory.fd, net.rx_ring.device + 2, 7 * rounds
    command = [sys.executable, "-c", WATCH, *map(str, sizes)]
    with subprocess.Popen(command, pass_fds=[rig.memory.fd], stdout=subprocess.PIPE, text=True) as watcher, ExitStack() as stack:
        stack.callback(watcher.kill)  # it would wait for ever for what does not come
        assert watcher.stdout.readline() == "watching\n"
        frame, buffers = Segment(rig.place(_frame(650)), 650), [Segment(rig.place(bytes(100)), 100) for _ in range(7)]
        for _ in range(rounds):
            for buffer in buffers:
                assert net.rx_ring.add([], [buffer], None)
            assert net.tx_ring.add([frame], [], None)
            assert net.mover.move() == 1
            assert len(net.rx_ring.collect()) == 7
            assert len(net.tx_ring.collect()) == 1
        assert watcher.stdout.read() == "\n"


def test_a_frame_waits_until_all_its_buffers_are_there(rig, features):
    net = Net(rig, features, MoveOptions(mergeable=True))
    net.send(_frame(250), token="tx")
    net.post(100)
    net.post(100)
    assert net.mover.move() == 0
    assert net.mover.wait is Wait.FULL
    assert net.tx_ring.collect() == net.rx_ring.collect() == []
    net.post(100)
    assert net.mover.move() == 1
    assert [len(part) for part in net.received()] == [100, 100, 62]
    assert net.tx_ring.collect() == [("tx", 0)]


def test_waiting_loses_nothing(net):
    sent, came = [], []
    for number in range(200):
        if net.tx_ring.free:
            sent.append(_frame(50, number))
            net.send(sent[-1])
        if number % 3 == 0:
            net.post(62)
        net.mover.move()
        net.tx_ring.collect()
        came += net.received()
    while len(came) < len(sent):
        net.post(62)
        net.mover.move()
        came += net.received()
    assert [frame[12:] for frame in came] == sent
    assert net.mover.counters.dropped == 0


def test_dropping_goes_on_without_buffers(rig, features):
    net = Net(rig, features, MoveOptions(drop=True))
    net.post(100)
    for number in range(5):
        net.send(_frame(50, number), token=number)
    assert net.mover.move() == 5
    assert net.mover.counters == MoveCounters(1, 50, 4, 0, 0)
    assert [done.token for done in net.tx_ring.collect()] == [0, 1, 2, 3, 4]
    assert len(net.received()) == 1


def test_no_receive_queue_drops(rig, features):
    ring, queue = rig.pair(features=features)
    mover = rig.engine.mover(queue.ring, None, MoveOptions())
    ring.add([Segment(rig.place(bytes(40)), 40)], [], 0)
    assert mover.move() == 1
    assert mover.counters == MoveCounters(0, 0, 1, 0, 0)


def test_frames_without_a_header_or_content_are_dropped(net):
    net.post(100)
    net.send(b"", header=b"")
    net.send(b"", header=bytes(11))
    net.send(b"", header=bytes(12))
    net.send(b"x")
    assert net.mover.move() == 4
    assert net.mover.counters == MoveCounters(1, 1, 0, 3, 0)


def test_frames_too_large_are_dropped_and_the_buffer_stays(rig, features):
    net = Net(rig, features)
    net.post(100)
    net.send(_frame(89))
    net.send(_frame(88))
    assert net.mover.move() == 2
    assert net.mover.counters == MoveCounters(1, 88, 0, 0, 1)
    assert net.received() == [ZERO + b"\1\0" + _frame(88)]


def test_a_frame_the_whole_ring_cannot_hold_is_dropped(rig, features):
    net = Net(rig, features, MoveOptions(mergeable=True), num=4)
    for _ in range(4):
        net.post(20)
    net.send(_frame(69))
    net.send(_frame(68))
    assert net.mover.move() == 2
    assert net.mover.counters == MoveCounters(1, 68, 0, 0, 1)
    assert len(net.received()) == 4


def test_frames_beyond_any_size_are_dropped(rig, features):
    net = Net(rig, features, MoveOptions(mergeable=True))
    at = rig.place(bytes(12))
    net.tx_ring.add([Segment(at, 12), Segment(0, 69633)], [], 0)
    net.tx_ring.add([Segment(0, 1 << 19)] * 8, [], 0)
    assert net.mover.move() == 2
    assert net.mover.counters.oversize == 2


def test_a_burst_is_bounded(rig):
    net = Net(rig, Feature(0), num=2 * MAX_BURST)
    for _ in range(10 + MAX_BURST + 26):
        net.send(b"x")
        net.post(13)
    assert [net.mover.move(10), net.mover.wait, net.mover.move(1000), net.mover.move(), net.mover.move(), net.mover.wait] == [
        10,
        Wait.MORE,
        MAX_BURST,
        26,
        0,
        Wait.EMPTY,
    ]


def test_two_devices_with_memory_of_their_own(rigs, engine, features):
    net = Net(rigs(engine), features, other=rigs(engine))
    net.send(_frame(100))
    net.post(200)
    net.mover.move()
    assert net.received() == [ZERO + b"\1\0" + _frame(100)]


def test_both_drivers_are_signalled(net):
    tx_call, rx_call = net.rig.eventfd(), net.rig.eventfd()
    net.tx.set_call(tx_call)
    net.rx.set_call(rx_call)
    net.tx_ring.want_signals(True)
    net.rx_ring.want_signals(True)
    for _ in range(3):
        net.send(b"x")
        net.post(13)
    net.mover.move()
    assert (os.eventfd_read(tx_call), os.eventfd_read(rx_call)) == (1, 1)


# -- broken rings ----------------------------------------------------------------------------------------------------------


def test_a_broken_transmit_ring_stops_after_the_good_frames(net):
    net.post(100)
    net.post(100)
    net.send(b"good")
    net.tx_ring.add([Segment(1 << 40, 100)], [], 0)
    assert net.mover.move() == 1
    assert len(net.received()) == 1
    assert net.mover.move() == 0
    assert net.mover.wait is Wait.BROKEN
    assert isinstance(net.tx.broken, RingError)
    assert net.tx.broken.fault is Fault.ADDRESS
    assert net.rx.broken is None


def test_a_broken_receive_ring_leaves_the_transmit_ring_in_order(net):
    net.post(100)
    net.rx_ring.add([], [Segment(1 << 40, 100)], 0)
    net.send(b"one", token=1)
    net.send(b"two", token=2)
    assert net.mover.move() == 1
    assert net.mover.move() == 0
    assert net.rx.broken.fault is Fault.ADDRESS
    assert net.tx.broken is None
    assert [done.token for done in net.tx_ring.collect()] == [1]
    assert net.tx.ring.inflight == 0


def test_a_receive_buffer_without_room_for_the_header(net):
    net.post(11)
    net.send(b"x")
    assert net.mover.move() == 0
    assert str(net.rx.broken) == "rx is broken by its driver: a receive buffer of 11 bytes has no room for the frame's header"


def test_memory_that_goes_away_breaks_its_owner_only(rigs, engine, features):
    mine, theirs = rigs(engine), rigs(engine, sealed=False)
    net = Net(mine, features, other=theirs)
    net.post(100)
    net.send(b"x")
    os.ftruncate(theirs.memory.fd, 0)
    assert net.mover.move() == 0
    assert net.mover.wait is Wait.BROKEN
    assert str(net.tx.broken) == "tx is broken by its driver: the memory it shared has been truncated"
    assert net.rx.broken is None
    assert net.mover.counters == MoveCounters(0, 0, 0, 0, 0)


def test_a_receiver_that_goes_away_leaves_the_sender(rigs, engine, features):
    mine, theirs = rigs(engine, sealed=False), rigs(engine)
    net = Net(mine, features, other=theirs)
    net.post(100)
    net.send(b"x", token="kept")
    os.ftruncate(mine.memory.fd, 0)
    assert net.mover.move() == 0
    assert (net.tx.broken, net.rx.broken.fault) == (None, Fault.MEMORY)
    replacement = theirs.engine.mover(net.tx.ring, None, MoveOptions())
    assert replacement.move() == 1
    assert [done.token for done in net.tx_ring.collect()] == ["kept"]


def test_memory_that_ends_in_the_middle_of_a_frame(rigs, engine, features):
    rig = rigs(engine, sealed=False)
    net = Net(rig, features)
    end = rig.memory.size
    net.tx_ring.add([Segment(rig.place(bytes(12)), 12), Segment(end - 2 * PAGE, 2 * PAGE)], [], 0)
    net.post(3 * PAGE)
    os.ftruncate(rig.memory.fd, end - PAGE)
    assert net.mover.move() == 0
    assert net.tx.broken.fault is Fault.MEMORY
    assert os.fstat(rig.memory.fd).st_size == end - PAGE, "nobody made the client's file grow"


# -- the dirty log ---------------------------------------------------------------------------------------------------------


def _log(rig):
    size = rig.memory.size >> 15
    fd = os.memfd_create("log")
    os.ftruncate(fd, size)
    log = DirtyLog(fd, size)
    return fd, log


def _dirty(fd):
    data = os.pread(fd, 1 << 16, 0)
    return {8 * i + bit for i, byte in enumerate(data) for bit in range(8) if byte >> bit & 1}


def _changed(before, after):
    return {page for page in range(len(before) // PAGE) if before[page * PAGE :][:PAGE] != after[page * PAGE :][:PAGE]}


@pytest.mark.parametrize("log_ring", [True, False])
def test_every_page_that_changed_is_logged(rigs, engine, features, log_ring):
    rig = rigs(engine, 1 << 21)
    fd, log = _log(rig)
    net = Net(rig, features, MoveOptions(mergeable=True), num=256)
    net.tx.stop()
    net.rx.stop()
    for ring, queue in ((net.tx_ring, net.tx), (net.rx_ring, net.rx)):
        queue.start(rig.table, rig.config(ring, log=log, log_ring=log_ring))
    mover = rig.engine.mover(net.tx.ring, net.rx.ring, net.options)
    rng = random.Random(7)
    for number in range(100):
        net.post(rng.randrange(12, 3000), rng.randrange(1, 3000))
        if number < 60:
            net.send(rng.randbytes(rng.randrange(1, 5000)))
    before = bytes(rig.memory.map)
    while mover.move():
        net.tx.notify(True)
        net.rx.notify(False)
    changed, dirty = _changed(before, bytes(rig.memory.map)), _dirty(fd)
    os.close(fd)
    assert mover.counters.frames > 40
    ring_pages = {area // PAGE + i for ring in (net.tx_ring, net.rx_ring) for area in (ring.desc, ring.device) for i in range(3)}
    assert len(changed) > 50
    if log_ring:
        assert changed <= dirty
    else:
        assert changed - ring_pages <= dirty
        assert changed - dirty, "without the flag what is written of the ring is not logged"


def test_the_number_of_buffers_is_logged_once_it_is_known(rigs, engine, features):
    """Somebody may read the log, and the page, before the last buffer is filled; here the second one clears the log's own bits."""
    rig = rigs(engine)
    size = rig.memory.size >> 15
    at = rig.memory.allocate(PAGE, PAGE)
    log = DirtyLog(rig.memory.fd, size, at)
    net = Net(rig, features, MoveOptions(mergeable=True))
    net.rx.stop()
    net.rx.start(rig.table, rig.config(net.rx_ring, log=log))
    mover = engine.mover(net.tx.ring, net.rx.ring, net.options)
    first = rig.memory.allocate(100, PAGE)
    for address, length in ((first, 100), (at, size)):
        assert net.rx_ring.add([], [Segment(address, length)], None)
    net.send(_frame(88) + bytes(size))
    assert mover.move() == 1
    assert rig.look(first, 12) == ZERO + b"\2\0"
    dirty = rig.look(at, size)
    page = first // PAGE
    assert dirty[page // 8] >> page % 8 & 1


def test_vendors_writes_are_logged(rigs, engine):
    rig = rigs(engine)
    fd, log = _log(rig)
    ring = rig.ring()
    queue = rig.queue(ring, log=log)
    rig.memory.allocate(0, PAGE)
    ring.add([], [Segment(8 * PAGE - 2, 10), Segment(20 * PAGE, 100)], 0)
    (buffer,) = queue.take()
    buffer.write(bytes(30), 1)
    assert _dirty(fd) == {7, 8, 20}
    os.close(fd)


def test_a_log_that_is_too_short(rigs, engine, features):
    rig = rigs(engine)
    fd = os.memfd_create("log")
    os.ftruncate(fd, 1)
    net = Net(rig, features)
    net.rx.stop()
    net.rx.start(rig.table, rig.config(net.rx_ring, log=DirtyLog(fd, 1)))
    net.mover = rig.engine.mover(net.tx.ring, net.rx.ring, net.options)
    rig.memory.allocate(0, PAGE)
    while rig.memory.allocate(PAGE, PAGE) < 8 * PAGE:
        pass
    net.post(100)
    net.send(b"x")
    assert net.mover.move() == 0
    os.close(fd)
    assert net.rx.broken.fault is Fault.LOG
    assert str(net.rx.broken).endswith(" is beyond the end of the dirty log")


def test_a_log_that_is_truncated(rigs, engine, features):
    rig = rigs(engine)
    fd, log = _log(rig)
    net = Net(rig, features)
    net.rx.stop()
    net.rx.start(rig.table, rig.config(net.rx_ring, log=log))
    net.mover = rig.engine.mover(net.tx.ring, net.rx.ring, net.options)
    net.post(100)
    net.send(b"x")
    os.ftruncate(fd, 0)
    assert net.mover.move() == 0
    os.close(fd)
    assert net.rx.broken.fault is Fault.MEMORY
    assert net.tx.broken is None


def test_rings_of_two_engines_do_not_mix(rigs, c_engine):
    from mdevkit_virtio.engine import load

    _, one = rigs(load("python")).pair()
    _, two = rigs(c_engine).pair()
    with pytest.raises(TypeError, match="another engine"):
        c_engine.mover(two.ring, one.ring, MoveOptions())
    with pytest.raises(TypeError, match="another engine"):
        load("python").mover(one.ring, two.ring, MoveOptions())
    with pytest.raises(TypeError, match="another engine"):
        c_engine.loop([load("python").mover(one.ring, None, MoveOptions())])
