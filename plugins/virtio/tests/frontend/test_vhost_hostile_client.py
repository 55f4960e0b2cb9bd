"""A client that is out to do harm hurts its own device only: another one of the same process goes on, frame by frame.

What the other device carries is counted while the hostile client is at work; it is never timed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio.driverside import GuestMemory, Segment
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.ops import Status
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.frontend import PROTOCOL, Channel, PageLog
from mdevkit_virtio.vhost.proto import ProtocolFeature, Request

MIB = 1 << 20
PLAIN = Feature.VERSION_1 | proto.F_PROTOCOL_FEATURES
RINGS = {"split": PLAIN, "packed": PLAIN | Feature.RING_PACKED}


@pytest.fixture(params=RINGS)
def rings(request):
    return RINGS[request.param]


class Bystander(threading.Thread):
    """Uses another device of the process all the time; fails if a frame is lost, or if none moves any more."""

    def __init__(self, frontends, path):
        super().__init__(name="bystander", daemon=True)
        self.frontend = frontends(path)
        self.frontend.negotiate(PLAIN)
        self.memory = GuestMemory(4 * MIB)
        self.frontend.share(self.memory)
        self.pair = frontends.pair(self.memory, self.frontend.features, num=64)
        self.frontend.start(*self.pair.queues)
        self.frames = 0
        self.error = None
        self._stop_it = threading.Event()

    def run(self):
        try:
            while not self._stop_it.is_set():
                frames = [(self.frames + i).to_bytes(60, "little") for i in range(32)]
                assert self.pair.exchange(frames) == frames
                self.frames += len(frames)
        except BaseException as error:  # noqa: BLE001  # it is raised on the thread that looks
            self.error = error

    def goes_on(self, frames=640):
        """Wait until so many frames more have moved: none of what was done before holds it up."""
        wanted, deadline = self.frames + frames, time.monotonic() + 30
        while self.frames < wanted:
            assert self.error is None, self.error
            assert time.monotonic() < deadline, f"{wanted - self.frames} frames are missing"
            time.sleep(0.001)

    def end(self):
        self._stop_it.set()
        self.join(30)
        assert self.error is None, self.error


@pytest.fixture
def bystander(loopbacks, frontends):
    thread = Bystander(frontends, loopbacks().path)
    thread.start()
    thread.goes_on()
    yield thread
    thread.goes_on()
    thread.end()


def held():
    """Descriptors and threads of this process, and mappings of guest memory."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("memfd:guest")
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), maps


class Rig:
    """A client of a device, with frames on their way."""

    def __init__(self, frontends, path, rings, *, sealed=True, num=64):
        self._frontends = frontends
        self.frontend = frontends(path)
        self.frontend.negotiate(rings)
        self.memory = GuestMemory(4 * MIB, sealed=sealed)
        self.frontend.share(self.memory)
        self.pair = frontends.pair(self.memory, self.frontend.features, num=num, alignment=4096)
        self.frontend.start(*self.pair.queues)

    def works(self):
        frames = [bytes([i]) * 100 for i in range(50)]
        return self.pair.exchange(frames) == frames

    def close(self):
        """Go, and leave nothing."""
        for made in (self.frontend, self.pair):
            made.close()
            self._frontends.made.remove(made)
        self.memory.close()


def works_again(served, frontends, rings):
    """A fresh client finds the device as if nothing had been."""
    served.until_free()
    rig = Rig(frontends, served.path, rings)
    assert rig.works()
    rig.close()
    served.until_free()


def needs_reset(frontend):
    return bool(frontend.get_status() & Status.NEEDS_RESET)


# -- memory that goes away ---------------------------------------------------------------------------------------------


def test_memory_that_is_truncated_breaks_the_queue_and_nothing_else(loopbacks, frontends, bystander, rings):
    served = loopbacks()
    rig = Rig(frontends, served.path, rings, sealed=False)
    assert rig.works()
    os.ftruncate(rig.memory.fd, 0)
    for queue in rig.pair.queues:
        os.eventfd_write(queue.kick, 1)
    served.until(lambda: needs_reset(rig.frontend))
    assert served_error(rig)
    bystander.goes_on()
    rig.frontend.close()
    works_again(served, frontends, rings)


def served_error(rig):
    """The frontend is told on its error descriptor too."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for queue in rig.pair.queues:
            with contextlib.suppress(BlockingIOError):
                return os.eventfd_read(queue.err)
        time.sleep(0.001)
    return 0


def test_truncation_at_random_moments(loopbacks, frontends, bystander, rings):
    served = loopbacks()
    chance = random.Random(1)
    for _ in range(20):
        rig = Rig(frontends, served.path, rings, sealed=False)
        rig.pair.send([bytes(chance.randint(14, 1514)) for _ in range(chance.randint(0, 64))])
        os.ftruncate(rig.memory.fd, chance.choice([0, 4096, 8192, 1 << 16, MIB, 2 * MIB]))
        for queue in rig.pair.queues:
            os.eventfd_write(queue.kick, 1)
        with contextlib.suppress(MdevError):
            rig.frontend.stop()
        rig.frontend.close()
        served.until_free()
    bystander.goes_on()
    works_again(served, frontends, rings)


def test_a_log_that_is_truncated(loopbacks, frontends, bystander, rings):
    served = loopbacks()
    rig = Rig(frontends, served.path, rings)
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096)
    rig.frontend.ask(Request.SET_LOG_BASE, proto.LogBase(4096, 0).pack(), [fd])
    rig.frontend.set_features(rig.frontend.features | proto.F_LOG_ALL)
    os.ftruncate(fd, 0)
    os.close(fd)
    rig.pair.send([bytes(60)] * 10)
    served.until(lambda: needs_reset(rig.frontend))
    bystander.goes_on()
    rig.frontend.close()
    works_again(served, frontends, rings)


# -- rings that lie ----------------------------------------------------------------------------------------------------


def test_descriptors_of_garbage(loopbacks, frontends, bystander, rings):
    served = loopbacks()
    for seed in range(30):
        chance = random.Random(seed)
        rig = Rig(frontends, served.path, rings)
        for queue in rig.pair.queues:
            ring, size = queue.ring, 16 * 64
            rig.memory.map[ring.desc : ring.desc + size] = chance.randbytes(size)
            if not rings & Feature.RING_PACKED:
                rig.memory.map[ring.driver : ring.driver + 132] = chance.randbytes(132)
            os.eventfd_write(queue.kick, 1)
        rig.frontend.stop()
        rig.frontend.close()
        served.until_free()
    bystander.goes_on()
    works_again(served, frontends, rings)


def test_a_buffer_outside_memory_breaks_the_queue(loopbacks, frontends, bystander, rings):
    served = loopbacks()
    rig = Rig(frontends, served.path, rings)
    rig.pair.tx.ring.add([Segment(1 << 40, 100)], [], 0)
    os.eventfd_write(rig.pair.tx.kick, 1)
    served.until(lambda: needs_reset(rig.frontend))
    bystander.goes_on()
    # It can be reset, and then works.
    rig.frontend.reset_device()
    rig.frontend.close()
    works_again(served, frontends, rings)


def test_rings_are_rewritten_all_the_time(loopbacks, frontends, bystander, rings):
    served = loopbacks()
    for seed in range(5):
        chance = random.Random(seed)
        rig = Rig(frontends, served.path, rings)
        for _ in range(200):
            queue = chance.choice(rig.pair.queues)
            at = chance.choice([queue.ring.desc, queue.ring.driver, queue.ring.device]) + chance.randrange(1000)
            rig.memory.map[at : at + 4] = chance.randbytes(4)
            os.eventfd_write(queue.kick, 1)
        rig.frontend.close()
        served.until_free()
    bystander.goes_on()
    works_again(served, frontends, rings)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_garbage_instead_of_messages(loopbacks, frontends, bystander):
    served = loopbacks()
    for seed in range(60):
        chance = random.Random(seed)
        channel = Channel.connect(served.path, 5)
        with contextlib.suppress(MdevError):
            channel.send(chance.randbytes(chance.choice([1, 11, 12, 13, 100, 5000])))
        channel.shutdown()
        assert channel.closed_by_backend()
        channel.close()
    bystander.goes_on()
    works_again(served, frontends, PLAIN)


def random_payload(chance):
    """Return a payload of some request; its numbers are those that tend to hurt."""
    wide = [0, 1, 4096, MIB, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1, chance.getrandbits(32)]

    def numbers(count):
        return [chance.choice(wide) for _ in range(count)]

    index = chance.choice([0, 1, 2, 3, 4, 255, 1 << 31])
    makers = [
        lambda: b"",
        lambda: proto.pack_u64(chance.choice([*wide, 255, 256, 1 << 30, chance.getrandbits(64)])),
        lambda: proto.VringState(index, chance.choice([0, 1, 3, 256, 1 << 16, 0xFFFFFFFF])).pack(),
        lambda: proto.VringAddr(index, *numbers(3), chance.getrandbits(1), *numbers(1)).pack(),
        lambda: proto.MemRegion(*numbers(4)).pack(),
        lambda: proto.pack_mem_table([proto.MemRegion(*numbers(4)) for _ in range(chance.randint(0, 9))]),
        lambda: proto.LogBase(*numbers(2)).pack(),
        lambda: chance.randbytes(chance.randint(0, 300)),
    ]
    return chance.choice(makers)()[: proto.MAX_PAYLOAD]


def pipe():
    reader, writer = os.pipe()
    os.close(writer)
    return reader


FILES = [lambda: os.memfd_create("x"), lambda: os.eventfd(0), pipe, lambda: os.open("/dev/null", os.O_RDWR)]


def random_message(chance):
    """Return a message that is well-formed on the outside, and its descriptors."""
    request, flags = chance.choice([*Request, 0, 99, 1 << 31]), chance.choice([0, 0, proto.NEED_REPLY, proto.REPLY])
    message = proto.message(request, random_payload(chance), flags)
    return message, [chance.choice(FILES)() for _ in range(chance.choice([0, 0, 1, 1, 2, 8]))]


def test_random_messages_in_a_running_session(loopbacks, frontends, bystander, rings):
    served = loopbacks(pairs=2)
    for seed in range(40):
        chance = random.Random(seed)
        rig = Rig(frontends, served.path, rings)
        for _ in range(40):
            message, fds = random_message(chance)
            try:
                rig.frontend.channel.send(message, fds)
            except MdevError:
                break
            finally:
                for fd in fds:
                    os.close(fd)
        rig.frontend.close()
        served.until_free()
    bystander.goes_on()
    works_again(served, frontends, rings)


def test_descriptors_that_are_not_what_they_should_be(loopbacks, frontends, bystander, tmp_path):
    served = loopbacks()
    rig = Rig(frontends, served.path, PLAIN)
    reader, writer = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for fd in (reader, writer, file, rig.memory.fd):
        with pytest.raises(MdevError, match="the backend refused SET_VRING_KICK"):
            rig.frontend.set_fd(Request.SET_VRING_KICK, 0, fd)
        with pytest.raises(MdevError, match="the backend refused SET_VRING_CALL"):
            rig.frontend.set_fd(Request.SET_VRING_CALL, 0, fd)
    region = proto.MemRegion(8 * MIB, MIB, 8 * MIB, 0)
    for fd in (reader, file, rig.pair.rx.kick):
        with pytest.raises(MdevError, match="the backend refused ADD_MEM_REG"):
            rig.frontend.tell(Request.ADD_MEM_REG, region.pack(), [fd])
    assert rig.works()
    for fd in (reader, writer, file):
        os.close(fd)


def test_a_call_eventfd_that_is_full_stops_nobody_else(loopbacks, frontends, bystander, rings):
    served = loopbacks()
    rig = Rig(frontends, served.path, rings)
    blocking = os.eventfd(0, os.EFD_CLOEXEC)
    rig.frontend.set_fd(Request.SET_VRING_CALL, 0, blocking)
    os.eventfd_write(blocking, 0xFFFFFFFFFFFFFFFE)
    rig.pair.rx.ring.want_signals(True)
    rig.pair.send([bytes(60)] * 50)
    rig.pair.settle()
    bystander.goes_on()
    rig.frontend.stop()
    os.close(blocking)


def test_a_flood_of_messages_and_connections(loopbacks, frontends, bystander):
    served = loopbacks()
    stop = threading.Event()
    errors = []
    frontend = frontends(served.path)
    frontend.get_features()  # whoever speaks first is the client

    def flood():
        try:
            while not stop.is_set():
                for _ in range(100):
                    frontend.channel.send(proto.message(Request.SET_OWNER))
                frontend.get_features()
        except MdevError as error:
            errors.append(error)

    def knock():
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(served.path))

    threads = [threading.Thread(target=flood), threading.Thread(target=knock)]
    for thread in threads:
        thread.start()
    bystander.goes_on(6400)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    frontend.close()
    works_again(served, frontends, PLAIN)


def test_a_hundred_connections(loopbacks, frontends, bystander):
    served = loopbacks()
    works_again(served, frontends, PLAIN)
    before = held()
    crowd = []
    for number in range(100):
        sock = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(ConnectionError):
            sock.connect(str(served.path))
        if number % 2:
            with contextlib.suppress(OSError):
                sock.send(proto.message(Request.GET_FEATURES))
        crowd.append(sock)
    bystander.goes_on()
    for sock in crowd:
        sock.close()
    works_again(served, frontends, PLAIN)
    served.until(lambda: held() == before)


# -- vanishing ---------------------------------------------------------------------------------------------------------


class EnoughError(Exception):
    """The client vanishes here."""


class Mortal(Channel):
    """A channel that dies after so many bytes, in the middle of a message if need be."""

    def __init__(self, sock, budget):
        super().__init__(sock, 5)
        self.budget = budget

    def send(self, data, fds=()):
        part = data[: max(0, self.budget - self.bytes_sent)]
        if part:
            super().send(part, fds)
        if len(part) < len(data):
            self.close()
            raise EnoughError


def session(frontends, path, rings, protocol, budget):
    """A whole life of a client, up to the byte at which it vanishes; return how many bytes it has sent."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    channel = Mortal(sock, budget)
    frontend = frontends(channel)
    memory = GuestMemory(MIB)
    pair = frontends.pair(memory, rings, num=8)
    log = PageLog(memory.size)
    try:
        frontend.negotiate(rings, protocol)
        frontend.share(memory, [(0, MIB // 2), (MIB // 2, MIB // 2)])
        frontend.start(*pair.queues)
        pair.send([bytes(60)] * 8)
        frontend.start_log(log)
        frontend.get_config(0, 6)
        frontend.remove_region(MIB // 2)
        frontend.stop(pair.rx)
        frontend.start(pair.rx)
        frontend.stop_log()
        frontend.stop()
        frontend.set_status(0)
    except EnoughError:
        pass
    finally:
        frontend.close()
        pair.close()
        log.close()
        memory.close()
        frontends.made.remove(pair)
        frontends.made.remove(frontend)
    return channel.bytes_sent


@pytest.mark.parametrize("left_out", [ProtocolFeature(0), ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS])
def test_it_vanishes_at_any_byte(loopbacks, frontends, bystander, rings, left_out, engine):
    served = loopbacks()
    protocol = PROTOCOL & ~left_out
    works_again(served, frontends, rings)
    before = held()
    whole = session(frontends, served.path, rings, protocol, 1 << 30)
    served.until_free()
    # A sample, larger for the engine that is fast; each time others.
    for budget in random.sample(range(whole), 120 if engine.name == "c" else 40):
        session(frontends, served.path, rings, protocol, budget)
        served.until_free()
    served.until(lambda: held() == before)
    bystander.goes_on()
    works_again(served, frontends, rings)
