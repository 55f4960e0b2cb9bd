"""The kit for network devices whose frames pass through Python: what a driver gets and gives, and what becomes of the rest."""

from __future__ import annotations

import errno
import threading

import pytest
from mdevkit.errors import MdevError
from mdevkit_testkit.suites.virtio.guest import DRIVER_OK, Guest
from mdevkit_virtio.layout import MAX_FRAME, MAX_MERGE, MAX_TAKE, Feature
from mdevkit_virtio.memory import MemoryTable
from mdevkit_virtio.netmodel import RX, TX, NetModel

PATIENCE = 20
MAC = bytes.fromhex("020000000042")
MERGEABLE = Feature.NET_MRG_RXBUF
MODERN = Feature.VERSION_1


class Wire(NetModel):
    """A device whose frames are kept, and sent only as fast as it is let."""

    vendor_id = 7

    def __init__(self, engine, **options):
        super().__init__(MAC, name="wire", engine=engine, **options)
        self.sent = []
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def transmit(self, frame):
        self.sent.append(frame)
        self.arrived.set()
        assert self.go_on.wait(PATIENCE)
        if frame.startswith(b"bug"):
            raise MdevError(errno.EIO, "this vendor has a bug")


@pytest.fixture
def wires(engine, no_leaks):
    """Makes a device and its driver, which runs: ``wires(features, backlog=...)``."""
    made = []

    def make(features=MODERN, num=64, **options):
        wire = Wire(engine, **options)
        guest = Guest(wire, int(features))
        made.extend([wire, guest])
        guest.start(num=num)
        return wire, guest.port()

    yield make
    for thing in reversed(made):
        thing.close()


def frames(count, size=60):
    return [number.to_bytes(4, "big") * (size // 4) for number in range(count)]


def wait_sent(wire, count):
    assert Guest.wait(lambda: len(wire.sent) >= count, PATIENCE)


# -- what the driver sends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [MODERN, MODERN | Feature.RING_PACKED, MODERN | Feature.EVENT_IDX | Feature.INDIRECT_DESC])
def test_frames_are_transmitted_in_order(wires, features):
    wire, port = wires(features, num=4 * MAX_TAKE, queue_size=4 * MAX_TAKE)
    sent = frames(3 * MAX_TAKE)
    port.send(*sent)
    assert port.until(lambda: port.sent == len(sent), PATIENCE)
    assert wire.sent == sent
    assert (wire.counters.tx_packets, wire.counters.tx_bytes) == (len(sent), 60 * len(sent))


def test_more_than_one_batch_is_taken_from_a_full_ring(wires):
    """The worker looks at a batch; for the rest, of which no kick tells, it has to come back."""
    wire, port = wires(num=256)
    wire.go_on.clear()
    port.send(b"first" * 12)
    assert wire.arrived.wait(PATIENCE)
    port.send(*frames(200))
    wire.go_on.set()
    wait_sent(wire, 201)


@pytest.mark.parametrize(("features", "header"), [(0, 10), (MERGEABLE, 12), (MODERN, 12)])
def test_the_header_is_as_long_as_the_features_say(wires, features, header):
    wire, port = wires(features)
    port.send(b"frame" * 12, header=bytes(header))
    wait_sent(wire, 1)
    assert wire.sent == [b"frame" * 12]
    port.post(1)
    assert wire.deliver(b"answer" * 10)
    assert port.until(lambda: port.received, PATIENCE)
    assert port.received[0][header:] == b"answer" * 10
    if header == 12:
        assert port.received[0][10:12] == b"\x01\x00"


@pytest.mark.parametrize("length", [1, 12])
def test_what_is_no_frame_is_used_up_and_not_transmitted(wires, length):
    wire, port = wires()
    port.send(b"", header=bytes(length))
    port.send(b"frame" * 12)
    assert port.until(lambda: port.sent == 2, PATIENCE)
    assert wire.sent == [b"frame" * 12]
    assert wire.counters.tx_packets == 1


def test_a_sender_without_an_end_does_not_hold_up_its_driver(wires):
    """The queue is stopped while it is never empty: the worker goes on with one batch at most."""
    wire, port = wires(num=256)
    more = threading.Event()
    ring = port.guest.rings[TX]

    def refill(frame):
        wire.sent.append(frame)
        while (done := ring.collect()) and not more.is_set():
            for room, _ in done:
                ring.add([room], [], room)

    wire.transmit = refill
    port.send(*frames(256))
    wait_sent(wire, 1000)
    stopped = threading.Thread(target=wire.set_vq_ready, args=(TX, False), daemon=True)
    stopped.start()
    stopped.join(PATIENCE)
    more.set()
    assert not stopped.is_alive()
    del wire.transmit  # which knows the ring, and so its memory


def test_a_vendors_bug_breaks_its_queue_alone(wires):
    wire, port = wires()
    port.post(4)
    port.send(b"bug" * 20)
    assert Guest.wait(lambda: wire.error is not None, PATIENCE)
    assert wire.deliver(b"still" * 12)
    assert port.expect(1, PATIENCE) == [b"still" * 12]


# -- what the driver receives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [MODERN, MODERN | Feature.RING_PACKED, MODERN | MERGEABLE])
def test_frames_are_received_in_order(wires, features):
    wire, port = wires(features)
    port.post(32)
    wanted = frames(500)
    for start in range(0, 500, 25):
        assert all(wire.deliver(frame) for frame in wanted[start : start + 25])
        assert port.expect(25, PATIENCE) == wanted[start : start + 25]
    assert (wire.counters.rx_packets, wire.counters.rx_bytes, wire.counters.rx_dropped) == (500, 30000, 0)


def test_frames_wait_for_buffers(wires):
    wire, port = wires()
    wanted = frames(40)
    assert all(wire.deliver(frame) for frame in wanted)
    port.post(3)
    assert port.expect(40, PATIENCE) == wanted


def test_a_frame_is_spread_over_merged_buffers(wires):
    """How many they are is in the first one's header (5.1.6.3.2, num_buffers)."""
    wire, port = wires(MODERN | MERGEABLE)
    port.post(20, size=256)
    frame = bytes(range(250)) * 6
    assert wire.deliver(frame)
    assert port.until(lambda: len(port.received) == 6, PATIENCE)
    parts, port.received = port.received, []
    assert parts[0][10:12] == (6).to_bytes(2, "little")
    assert b"".join(parts)[12:] == frame
    assert [len(part) for part in parts] == [256] * 5 + [12 + 1500 - 5 * 256]
    assert wire.deliver(b"short" * 12)
    assert port.until(lambda: port.received, PATIENCE)
    assert port.received[0][10:] == b"\x01\x00" + b"short" * 12


def test_a_merged_frame_waits_for_enough_buffers(wires):
    wire, port = wires(MODERN | MERGEABLE)
    port.post(3, size=256)
    frame = bytes(1500)
    assert wire.deliver(frame)
    assert not port.until(lambda: port.received, 0.05)
    port.post(3, size=256)
    assert port.until(lambda: len(port.received) == 6, PATIENCE)
    assert b"".join(port.received)[12:] == frame


def test_a_frame_for_which_a_buffer_is_too_small_is_dropped(wires):
    wire, port = wires()
    port.post(4, size=100)
    assert wire.deliver(bytes(89))
    assert wire.deliver(b"fits" * 22)
    assert port.expect(1, PATIENCE) == [b"fits" * 22]
    assert (wire.counters.rx_packets, wire.counters.rx_dropped) == (1, 1)


def test_a_frame_that_fits_into_no_ring_is_dropped(wires):
    wire, port = wires(MODERN | MERGEABLE, num=4)
    port.post(4, size=100)
    assert wire.deliver(bytes(400))
    assert wire.deliver(b"fits" * 22)
    assert port.expect(1, PATIENCE) == [b"fits" * 22]
    assert wire.counters.rx_dropped == 1


def test_buffers_without_room_are_not_collected_for_ever(wires):
    """A large ring full of them: a frame is given up after as many as a frame may take, and the worker is free again."""
    wire, port = wires(MODERN | MERGEABLE, num=4 * MAX_MERGE, queue_size=4 * MAX_MERGE)
    ring, nothing = port.guest.rings[RX], port.guest.place(b"readable")
    for _ in range(4 * MAX_MERGE):
        assert ring.add([nothing], [], None)
    assert wire.deliver(bytes(60))
    assert Guest.wait(lambda: wire.counters.rx_dropped == 1, PATIENCE)
    with wire.changing():
        assert wire.get_vq_state(RX) == MAX_MERGE


def test_a_full_backlog_refuses_frames(wires):
    wire, port = wires(backlog=3)
    assert [wire.deliver(frame) for frame in frames(5)] == [True, True, True, False, False]
    port.post(8)
    assert port.expect(3, PATIENCE) == frames(3)
    assert wire.counters.rx_dropped == 2
    assert wire.deliver(b"again" * 12)
    assert port.expect(1, PATIENCE) == [b"again" * 12]


def test_the_longest_frame(wires):
    wire, port = wires()
    assert not wire.deliver(bytes(MAX_FRAME - 11))
    port.post(1, size=MAX_FRAME)
    frame = bytes(MAX_FRAME - 12)
    assert wire.deliver(frame)
    assert port.expect(1, PATIENCE) == [frame]


# -- stopping, resetting, closing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_buffers_that_were_taken_and_not_used_are_taken_again(wires, packed):
    """A merged frame has made the device take buffers that are too few; the queue stops, and goes on."""
    wire, port = wires(MODERN | MERGEABLE | (Feature.RING_PACKED if packed else 0))
    port.post(2, size=256)
    assert wire.deliver(b"A" * 100)
    assert port.until(lambda: port.received, PATIENCE)
    port.received.clear()
    assert wire.deliver(b"B" * 1000)
    assert not port.until(lambda: port.received, 0.05)
    before = wire.get_vq_state(RX)
    wire.set_vq_ready(RX, False)
    state = wire.get_vq_state(RX)
    assert state != before or packed
    wire.set_vq_state(RX, state)
    wire.set_vq_ready(RX, True)
    port.post(2, size=256)
    assert port.until(lambda: len(port.received) == 4, PATIENCE)
    assert b"".join(port.received)[12:] == b"B" * 1000


def test_memory_moves_while_buffers_are_spare(wires):
    wire, port = wires(MODERN | MERGEABLE)
    port.post(2, size=256)
    assert wire.deliver(b"B" * 1000)
    assert not port.until(lambda: port.received, 0.05)
    wire.set_map(port.guest.table())
    port.post(2, size=256)
    assert port.until(lambda: len(port.received) == 4, PATIENCE)
    assert b"".join(port.received)[12:] == b"B" * 1000


def test_what_waits_is_forgotten_by_a_reset(wires):
    wire, port = wires()
    assert wire.deliver(b"old" * 20)
    guest = port.guest
    guest.start(num=64)
    port = guest.port()
    port.post(4)
    assert wire.deliver(b"new" * 20)
    assert port.expect(2, 0.1) == [b"new" * 20]


def test_frames_for_a_device_without_a_driver_are_refused(wires):
    wire, port = wires()
    wire.set_status(0)
    assert not wire.deliver(bytes(60))
    port.guest.negotiate()
    assert not wire.deliver(bytes(60))
    assert wire.counters.rx_dropped == 2


def test_a_queue_that_broke_leaves_the_rest_and_a_reset_heals_it(wires):
    wire, port = wires()
    guest = port.guest
    port.post(4)
    with pytest.raises(OSError, match="not in one shared region"):
        guest.ops.set_map(MemoryTable())
    assert wire.deliver(bytes(60))
    guest.start(num=64)
    assert wire.get_status() == DRIVER_OK
    port = guest.port()
    port.post(4)
    assert wire.deliver(b"new" * 20)
    assert port.expect(1, PATIENCE) == [b"new" * 20]


def test_buffers_of_a_ring_that_broke_are_forgotten(wires):
    """They are in the memory of a driver that is gone when the next one comes."""
    wire, port = wires(MODERN | MERGEABLE)
    guest = port.guest
    port.post(1, size=1024)
    assert wire.deliver(b"B" * 1500)
    assert Guest.wait(lambda: wire.get_vq_state(RX) == 1, PATIENCE), "it is taken, and too small"
    at = guest.rings[RX].driver + 2
    guest.memory.map[at : at + 2] = (5000).to_bytes(2, "little")
    guest.kick(RX, always=True)
    assert Guest.wait(lambda: wire.error is not None, PATIENCE)
    guest.start(num=64)
    port = guest.port()
    port.post(4)
    assert wire.deliver(b"new" * 20)
    assert port.expect(1, PATIENCE) == [b"new" * 20]
    assert wire.get_status() == DRIVER_OK


def test_frames_are_delivered_while_the_device_closes(engine, no_leaks):
    """Whoever delivers is another device's thread: it must not fail, nor write to a descriptor that is somebody else's by now."""
    for _ in range(20):
        wire = Wire(engine)
        guest = Guest(wire, int(MODERN))
        guest.start(num=64)
        guest.port().post(16)
        failures, go = [], threading.Barrier(2)

        def flood(wire=wire, failures=failures, go=go):
            go.wait()
            try:
                while wire.deliver(bytes(60)) or wire.running:
                    pass
            except OSError as error:
                failures.append(error)

        flooding = threading.Thread(target=flood)
        flooding.start()
        go.wait()
        wire.close()
        flooding.join(PATIENCE)
        guest.forget()
        assert (failures, flooding.is_alive()) == ([], False)
        assert not wire.deliver(bytes(60))
