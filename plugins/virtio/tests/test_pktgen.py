"""``mdevkit pktgen``: frames, latencies, and the accounting of whatever a device does to frames."""

from __future__ import annotations

import errno
import json
import random
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mdevkit import MdevError
from mdevkit_virtio.pktgen.frames import MIN_SIZE, FrameMaker, check_sizes
from mdevkit_virtio.pktgen.generator import Generator, Plan
from mdevkit_virtio.pktgen.latency import Histogram
from mdevkit_virtio.pktgen.link import StreamLink, open_link

UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a0bb"


@given(st.integers(0, 2**63), st.integers(0, 2**63), st.lists(st.integers(MIN_SIZE, 65535), min_size=1, max_size=5))
def test_frames_say_what_they_are(number, now, sizes):
    maker = FrameMaker(sizes, run=7)
    frame = maker.make(number, now)
    assert len(frame) == sizes[number % len(sizes)]
    assert maker.read(frame) == (number, now, True)
    assert FrameMaker(sizes, run=8).read(frame) is None


@given(st.integers(0, 1000), st.data())
def test_every_changed_byte_is_seen(number, data):
    maker = FrameMaker([80], run=7)
    frame = bytearray(maker.make(number, 5))
    at = data.draw(st.integers(0, 79))
    frame[at] ^= data.draw(st.integers(1, 255))
    seen = maker.read(bytes(frame))
    assert seen is None or seen != (number, 5, True)
    assert maker.read(maker.make(number, 5)[:79]) == (number, 5, False)


@pytest.mark.parametrize(("size", "most"), [(59, 1514), (1515, 1514), (0, 9014)])
def test_sizes_that_cannot_be(size, most):
    with pytest.raises(MdevError, match=f"frames of {size} bytes cannot be sent: 60 to {most} are possible here") as caught:
        check_sizes([60, size], most)
    assert caught.value.errno == errno.EINVAL


@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=300))
def test_percentiles_are_those_of_the_values(values):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    wanted = [1.0, 50.0, 90.0, 99.9, 100.0]
    for percent, found in zip(wanted, histogram.percentiles(wanted), strict=True):
        exact = ordered[max(0, -(-int(percent * 10) * len(ordered) // 1000) - 1)]
        assert abs(found - exact) <= exact / 64 + 1
    assert (histogram.least, histogram.most, histogram.count) == (ordered[0], ordered[-1], len(values))


def test_percentiles_of_nothing():
    assert Histogram().percentiles([50.0, 99.0]) == [0, 0]


class Wire:
    """A link that does to frames what ``does`` says: it gets a frame and returns those that come back."""

    max_frame = 1514

    def __init__(self, does=lambda frame: [frame], room=1000):
        self._does, self._room, self._back = does, room, []

    def send(self, frames):
        for frame in frames[: self._room]:
            self._back += self._does(frame)
        return len(frames[: self._room])

    def receive(self):
        back, self._back = self._back, []
        return back

    def wait(self, timeout, *, room):
        time.sleep(min(timeout, 0.01))  # there is nothing to wait for but time

    def close(self):
        pass


def generate(does=lambda frame: [frame], *, room=1000, **plan):
    plan = {"count": 500, "timeout": 0.05, **plan}
    return Generator(Wire(does, room), FrameMaker([60, 1514], run=1), Plan(**plan)).run()


def test_a_perfect_wire():
    result = generate(room=3)
    assert (result.sent, result.received, result.lost) == (500, 500, 0)
    assert result.flawless
    assert result.sent_bytes == result.received_bytes == 250 * (60 + 1514)


def test_what_is_lost_is_counted_and_does_not_stop_the_rest():
    rng = random.Random(5)
    gone = []
    result = generate(lambda frame: gone.append(1) or [] if rng.random() < 0.1 else [frame], window=16)
    assert result.lost == len(gone) > 10
    assert result.received == 500 - result.lost
    assert not result.flawless
    assert result.facts()["loss"] == result.lost / 500


def test_what_is_damaged_doubled_or_foreign_is_counted():
    broken = generate(lambda frame: [frame[:-1] + b"\xff\xfe"[: 1 + (frame[-1] == 0xFF)]][:1])
    assert broken.corrupt == broken.received == 500
    doubled = generate(lambda frame: [frame, frame])
    assert (doubled.received, doubled.duplicate, doubled.lost) == (500, 500, 0)
    assert not doubled.flawless
    foreign = generate(lambda frame: [frame, b"x" * 60, b"short"])
    assert (foreign.received, foreign.foreign, foreign.flawless) == (500, 1000, True)


def test_what_is_out_of_order_is_counted():
    held = []

    def swap(frame):
        held.append(frame)
        return [held.pop(), held.pop()] if len(held) == 2 else []

    result = generate(swap)
    assert (result.received, result.reordered, result.lost) == (500, 250, 0)


def test_what_is_late_is_lost_and_late():
    held = []

    def hold(frame):
        held.append(frame)
        return held if len(held) == 3 else []

    result = generate(hold, count=3, window=1, timeout=0.02)
    assert (result.sent, result.lost, result.late, result.received) == (3, 2, 2, 1)


def test_a_rate_is_kept():
    result = generate(rate=2000, count=400)
    assert result.received == 400
    assert 0.19 < result.seconds < 2, "the last of 400 frames is due after 0.1995 s"


def test_a_time_is_kept():
    result = generate(count=0, seconds=0.2, rate=1000)
    assert 0 < result.received <= 201
    assert result.lost == 0


def test_a_stop_ends_the_sending():
    generator = Generator(Wire(), FrameMaker([60], run=1), Plan(count=0, rate=1000), progress=lambda result: generator.stop())
    result = generator.run()
    assert 0 < result.sent == result.received < 2000


def test_latencies_are_those_of_the_wire(lab):
    mdev = lab.create()
    link = StreamLink(mdev.endpoint.describe()["socket"], 1500)
    result = Generator(link, FrameMaker([60], run=1), Plan(count=200, rate=2000, timeout=20)).run()
    link.close()
    facts = result.facts()
    assert result.flawless
    latency = facts["latency_us"]
    assert 1 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"] < 2e7
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("facts", "number", "text"),
    [
        ({"kind": None}, errno.ENODEV, f"device {UUID} is bound to no driver; try: mdevkit bind {UUID}"),
        ({"kind": "virtio", "error": "virtio0 has no driver"}, errno.ENODEV, "has no network interface: virtio0 has no driver"),
        ({"kind": "vfio-user", "type": "mtty-2"}, errno.EOPNOTSUPP, r"is no virtio network device but mtty-2 \(vfio-user\)"),
        ({"kind": "netdev", "client": "pid 9 (qemu)"}, errno.EBUSY, r"is in use by pid 9 \(qemu\)"),
        ({"kind": "netdev", "socket": "/no/such.sock"}, errno.ENODEV, "is gone: its socket /no/such.sock does not exist"),
        ({"kind": "vhost-user", "socket": "/no/such.sock"}, errno.ENODEV, "is gone: its socket /no/such.sock does not exist"),
    ],
)
def test_devices_that_cannot_be_used(facts, number, text):
    with pytest.raises(MdevError, match=text) as caught:
        open_link({"uuid": UUID, "state": "bound", **facts})
    assert caught.value.errno == number


def test_a_device_that_hangs_up_is_in_use(tmp_path):
    """Somebody may have come between our looking and our connecting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "x"))
        listener.listen()
        busy = threading.Thread(target=lambda: listener.accept()[0].close())
        busy.start()
        facts = {"uuid": UUID, "kind": "vhost-user", "socket": str(tmp_path / "x")}
        with pytest.raises(MdevError, match=f"device {UUID} is in use by another client: it hung up on us") as caught:
            open_link(facts)
        busy.join()
    assert caught.value.errno == errno.EBUSY
