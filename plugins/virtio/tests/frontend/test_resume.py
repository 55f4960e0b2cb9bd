"""A queue that is stopped goes on anywhere: after a reset, in another device, in another process, in the other engine.

What is looked at is what users care for: no frame is lost, none comes twice, none out of order. Stop points are random.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.engine import load
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.vhost import proto

MIB = 1 << 20
PLAIN = Feature.VERSION_1 | proto.F_PROTOCOL_FEATURES
RINGS = {
    "split": PLAIN,
    "split-event": PLAIN | Feature.EVENT_IDX,
    "packed": PLAIN | Feature.RING_PACKED,
    "packed-event-mergeable": PLAIN | Feature.RING_PACKED | Feature.EVENT_IDX | Feature.NET_MRG_RXBUF,
    "split-mergeable": PLAIN | Feature.NET_MRG_RXBUF,
}


@pytest.fixture(params=RINGS)
def rings(request):
    return RINGS[request.param]


class Numbered:
    """Frames that say which one they are, through a pair whose device changes."""

    def __init__(self, pair, chance, most=1200):
        self.pair, self.chance, self.most = pair, chance, most
        self.sent = self.came = 0

    def send_some(self):
        """Send a random number of frames, fewer than what may be on the way."""
        frames = [self._frame(self.sent + i) for i in range(self.chance.randint(0, 24))]
        self.sent += self.pair.send(frames)

    def receive_some(self, limit=None):
        """Check what has come."""
        for frame in self.pair.receive(limit):
            assert frame == self._frame(self.came)
            self.came += 1

    def finish(self):
        """Wait for all that was sent."""
        deadline = time.monotonic() + 20
        while self.came < self.sent:
            self.receive_some()
            assert time.monotonic() < deadline, f"{self.sent - self.came} of {self.sent} frames did not come"
            self.pair.wait(0.05)
        self.receive_some()
        assert self.came == self.sent

    def _frame(self, number):
        size = 8 + number * 7919 % self.most
        return number.to_bytes(8, "little") + bytes([number & 0xFF]) * (size - 8)


class Rig:
    """A pair in memory that a device after the other is given."""

    def __init__(self, frontends, rings, seed, num=32):
        self.frontends, self.rings = frontends, rings
        self.memory = GuestMemory(4 * MIB)
        self.pair = frontends.pair(self.memory, rings, num=num, frame=1514, room=400 if rings & Feature.NET_MRG_RXBUF else 1600)
        self.frames = Numbered(self.pair, random.Random(seed))

    def attach(self, path):
        """Go on at the device at `path`."""
        frontend = self.frontends(path)
        frontend.negotiate(self.rings)
        frontend.share(self.memory)
        frontend.start(*self.pair.queues)
        return frontend

    def traffic(self):
        """Leave the device at a random point: with frames it has not taken, and frames nobody has taken from it."""
        for _ in range(self.frames.chance.randint(0, 4)):
            self.frames.send_some()
            if self.frames.chance.random() < 0.7:
                self.frames.receive_some(self.frames.chance.choice([None, 1, 7]))

    def stops(self):
        """Count the times the device is stopped: 20, or more if it was too slow to take as many frames as make a test."""
        for number in range(1000):
            if number >= 20 and self.frames.sent > 50:
                return
            yield number
        raise AssertionError(f"the device took {self.frames.sent} frames only")


@pytest.mark.parametrize("seed", range(6))
def test_it_goes_on_at_another_device(loopbacks, frontends, rings, seed):
    rig = Rig(frontends, rings, seed)
    places = [loopbacks(), loopbacks()]
    for number in rig.stops():
        frontend = rig.attach(places[number % 2].path)
        rig.traffic()
        frontend.stop()
        rig.frames.receive_some(rig.frames.chance.choice([0, None]))
        frontend.close()
        places[number % 2].until_free()
    rig.attach(places[0].path)
    rig.frames.finish()


@pytest.mark.parametrize("seed", range(3))
def test_it_goes_on_at_the_same_device_on_the_same_connection(loopbacks, frontends, rings, seed):
    rig = Rig(frontends, rings, seed)
    frontend = rig.attach(loopbacks().path)
    for number in rig.stops():
        rig.traffic()
        frontend.stop()
        if number % 3 == 0:
            frontend.reset_device()
            frontend.negotiate(rings)
        frontend.start(*rig.pair.queues)
    rig.frames.finish()


@pytest.mark.parametrize("seed", range(2))
def test_one_queue_stops_and_goes_on_while_the_other_runs(loopbacks, frontends, rings, seed):
    rig = Rig(frontends, rings, seed)
    frontend = rig.attach(loopbacks().path)
    for _ in range(30):
        rig.traffic()
        queue = rig.frames.chance.choice(rig.pair.queues)
        frontend.stop(queue)
        rig.traffic()
        frontend.start(queue)
    rig.frames.finish()


def test_a_disabled_queue_keeps_its_frames(loopbacks, frontends, rings):
    rig = Rig(frontends, rings, 1)
    frontend = rig.attach(loopbacks().path)
    for _ in range(30):
        rig.traffic()
        queue = rig.frames.chance.choice(rig.pair.queues)
        frontend.enable(queue, False)
        rig.traffic()
        frontend.enable(queue, True)
    rig.frames.finish()


def test_it_goes_on_in_the_other_engine(loopbacks, frontends, rings, c_engine):
    rig = Rig(frontends, rings, 7)
    places = [loopbacks(engine=c_engine), loopbacks(engine=load("python"))]
    for number in range(20):
        frontend = rig.attach(places[number % 2].path)
        rig.traffic()
        frontend.stop()
        frontend.close()
        places[number % 2].until_free()
    rig.attach(places[0].path)
    rig.frames.finish()


SERVER = """
import importlib.util, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1])
fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
from mdevkit_virtio.engine import load
served = fixtures.Served(pathlib.Path(sys.argv[2]), int(sys.argv[3]), load(sys.argv[4]), 1)
print("ready", flush=True)
sys.stdin.read()
served.close()
"""


@pytest.fixture
def processes(engine, tmp_path, request):
    """Starts loopbacks in processes of their own: ``processes()`` returns the socket and the process."""
    made = []
    fixtures = request.path.with_name("conftest.py")

    def make():
        number = 1000 + len(made)
        command = [sys.executable, "-c", SERVER, str(fixtures), str(tmp_path), str(number), engine.name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        made.append(process)
        assert process.stdout.readline() == "ready\n"
        return tmp_path / f"{number}.sock", process

    yield make
    for process in made:
        process.stdin.close()
        assert process.wait(20) in {0, -signal.SIGKILL}
        process.stdout.close()


def test_it_goes_on_in_another_process(processes, frontends, rings):
    rig = Rig(frontends, rings, 11)
    for path, _ in (processes(), processes()):
        frontend = rig.attach(path)
        rig.traffic()
        rig.frames.send_some()
        frontend.stop()
        frontend.close()
    rig.attach(processes()[0])
    rig.frames.finish()


def test_a_killed_process_is_followed_by_another(processes, frontends):
    """Killed, it tells no base; a split ring's is in memory, and what was given back twice or never would show."""
    rig = Rig(frontends, RINGS["split"], 13)
    for _ in range(3):
        path, process = processes()
        frontend = rig.attach(path)
        for _ in range(5):
            rig.traffic()
        rig.frames.finish()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        frontend.close()
        rig.frames.send_some()  # nobody is there
        for queue in rig.pair.queues:
            queue.base = 0  # as DPDK's frontend does: the device finds the place itself
    rig.attach(processes()[0])
    rig.frames.finish()


def test_a_base_that_cannot_be_is_refused(loopbacks, frontends):
    rig = Rig(frontends, RINGS["packed"], 1)
    rig.pair.rx.base = 5000 | 1 << 15
    served = loopbacks()
    frontend = frontends(served.path)
    frontend.negotiate(rig.rings)
    frontend.share(rig.memory)
    with pytest.raises(OSError, match="the backend refused SET_VRING_ENABLE"):
        frontend.start(*rig.pair.queues)
    assert frontend.get_features()


def test_bases_are_told_with_both_halves_of_a_packed_ring(loopbacks, frontends):
    rig = Rig(frontends, RINGS["packed"], 1)
    frontend = rig.attach(loopbacks().path)
    for _ in range(3):
        rig.frames.sent += rig.pair.send([rig.frames._frame(rig.frames.sent + i) for i in range(20)])
        rig.frames.finish()
    frontend.stop()
    # 60 of 32 descriptors: position 28 of the second lap.
    assert [queue.base for queue in rig.pair.queues] == [28 << 16 | 28] * 2


def test_the_fixture_finds_a_frame_that_comes_twice(frontends):
    rig = Rig(frontends, RINGS["split"], 1)
    frames = itertools.chain([rig.frames._frame(0)], [rig.frames._frame(0)])
    rig.pair.receive = lambda limit: list(frames)
    with pytest.raises(AssertionError):
        rig.frames.receive_some()
