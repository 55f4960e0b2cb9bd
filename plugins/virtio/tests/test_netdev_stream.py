"""A netdev's socket: QEMU's framing, one program at a time, backpressure in both directions, and programs that misbehave."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from pathlib import Path

import pytest
from mdevkit import MdevError
from mdevkit_virtio.virtio.clients import open_stream
from mdevkit_virtio.virtio.stream import MAX_FRAME

PATIENCE = 20


def frame(number, size=60):
    return (b"\xff" * 6 + b"\x02\0\0\0\0\x07" + b"\x88\xb5" + number.to_bytes(4, "big")).ljust(size, bytes([number % 251]))


def packed(*frames):
    return b"".join(struct.pack(">I", len(one)) + one for one in frames)


@pytest.fixture
def netdev(lab):
    return lab.netdev()


@pytest.fixture
def path(lab, netdev):
    return lab.registry.mdevs[0].endpoint.describe()["socket"]


@pytest.fixture
def connect(path, netdev, wait_until):
    """Connects programs to the socket: ``connect()``."""
    made = []

    def make(*, admitted=True):
        made.append(open_stream(path))
        if admitted:
            wait_until(lambda: netdev.port is not None)
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def receive(stream, count):
    got = []
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    while len(got) < count:
        assert poll.poll(PATIENCE * 1000), f"{len(got)} of {count} frames came"
        got += stream.receive()
    return got


def exchange(stream, frames):
    """Send all and receive as many, whichever is possible first."""
    got, left = [], list(frames)
    poll = select.poll()
    while len(got) < len(frames):
        while left and stream.send(left[0]):
            left.pop(0)
        poll.register(stream, select.POLLIN | (select.POLLOUT if stream.blocked else 0))
        assert poll.poll(PATIENCE * 1000), f"{len(got)} of {len(frames)} frames came"
        stream.flush()
        got += stream.receive()
    return got


def test_frames_there_and_back(connect):
    stream = connect()
    sent = [frame(number, 60 + 7 * (number % 200)) for number in range(3000)]
    assert exchange(stream, sent) == sent


def test_the_framing_is_qemus(path):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(path)
        for byte in packed(frame(1, 70)):
            peer.sendall(bytes([byte]))
        assert peer.recv(74, socket.MSG_WAITALL) == struct.pack(">I", 70) + frame(1, 70)


def test_a_program_that_does_not_read_loses_nothing(connect, netdev, wait_until):
    stream = connect()
    sent = [frame(number, 1500) for number in range(2000)]
    left = list(sent)

    def full():
        while left and stream.send(left[0]):
            left.pop(0)
        return stream.blocked

    wait_until(full)
    wakeups = netdev.irq.wakeups
    wait_until(full)
    assert netdev.irq.wakeups - wakeups < 10, "nobody spins while nobody reads"
    assert 0 < len(left) < 2000
    assert exchange_rest(stream, left, len(sent)) == sent


def exchange_rest(stream, left, count):
    got = []
    poll = select.poll()
    while len(got) < count:
        stream.flush()
        while left and stream.send(left[0]):
            left.pop(0)
        poll.register(stream, select.POLLIN | (select.POLLOUT if stream.blocked else 0))
        assert poll.poll(PATIENCE * 1000)
        got += stream.receive()
    return got


def test_a_second_program_is_hung_up_on(lab, connect, wait_until):
    first = connect()
    assert f"pid {os.getpid()} (" in lab.registry.mdevs[0].endpoint.describe()["client"]
    second = connect()
    wait_until(lambda: select.select([second], [], [], 0)[0])
    with pytest.raises(MdevError, match="the peer has hung up") as caught:
        second.receive()
    assert caught.value.errno == errno.ECONNRESET
    assert exchange(first, [frame(1)]) == [frame(1)]


def test_the_next_program_gets_the_device(lab, connect, netdev, wait_until):
    for number in range(20):
        stream = connect()
        assert exchange(stream, [frame(number)]) == [frame(number)]
        stream.close()
        wait_until(lambda: netdev.port is None)
    assert lab.registry.mdevs[0].endpoint.describe()["client"] == ""


def test_a_user_of_this_process_comes_first(connect, netdev):
    with netdev.frames() as frames:
        stream = connect(admitted=False)
        assert select.select([stream], [], [], PATIENCE)[0]
        with pytest.raises(MdevError, match="hung up"):
            stream.receive()
        netdev.send(frame(1))
        assert frames.get(PATIENCE) == frame(1)


def test_frames_that_cannot_go_out_are_dropped_as_on_a_wire(lab, connect, netdev, wait_until):
    stream = connect()
    for bad in (b"", b"x" * 13, b"x" * 1519):
        assert stream.send(bad)
    assert exchange(stream, [frame(1)]) == [frame(1)]
    assert netdev.statistics.tx_dropped == 3
    lab.registry.mdevs[0].drvdata.ops.update_config(status=0)
    wait_until(lambda: not netdev.carrier)
    stream.send(frame(2))
    wait_until(lambda: netdev.statistics.tx_dropped == 4)


@pytest.mark.parametrize("garbage", [struct.pack(">I", MAX_FRAME + 1), b"\xff" * 4, b"GET / HTTP/1.1\r\n\r\n"])
def test_what_is_no_framing_ends_the_connection(connect, netdev, garbage, caplog, wait_until):
    stream = connect()
    stream.sock.sendall(garbage)
    wait_until(lambda: netdev.port is None)
    assert "are the most" in caplog.text
    with pytest.raises(MdevError, match="hung up"):
        receive(stream, 1)


def test_vanishing_in_the_middle_of_a_frame(connect, netdev, wait_until):
    for size in (1, 4, 20):
        stream = connect()
        stream.sock.sendall(packed(frame(1))[:size])
        stream.close()
        wait_until(lambda: netdev.port is None)
    assert exchange(connect(), [frame(2)]) == [frame(2)]


def test_suspending_keeps_the_connection(lab, connect, netdev):
    stream = connect()
    lab.registry.suspend()
    assert stream.send(frame(1))
    lab.registry.resume()
    assert exchange(stream, [frame(2)])[-1] == frame(2)


def readable(stream):
    """Wait for a stream; not with select, which knows no descriptor beyond 1,023."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))


def test_a_hundred_connections_at_once(path, netdev, wait_until):
    crowd = [open_stream(path) for _ in range(100)]
    wait_until(lambda: netdev.port is not None)
    hung_up = [stream for stream in crowd[1:] if readable(stream)]
    assert len(hung_up) == 99
    assert exchange(crowd[0], [frame(1)]) == [frame(1)]
    for stream in crowd:
        stream.close()
    wait_until(lambda: netdev.port is None)


def test_the_socket_goes_with_the_driver(lab, path):
    assert Path(path).exists()
    lab.registry.unbind(lab.registry.mdevs[0].name)
    assert not Path(path).exists()


def test_nothing_wakes_an_idle_device(lab, connect, wait_until):
    """Idle means asleep: no thread of the device's is scheduled while there is no traffic, a connected program or not."""
    stream = connect()
    assert exchange(stream, [frame(1)]) == [frame(1)]
    netdev = lab.registry.mdevs[0].endpoint.device.endpoint.netdev
    workers = lab.registry.mdevs[0].drvdata.ops.movers
    tids = [netdev.irq.native_id, *(worker.native_id for worker in workers)]
    assert len(set(tids)) == 2
    wait_until(lambda: all(asleep(tid) for tid in tids))
    before = [timeslices(tid) for tid in tids]
    select.select([], [], [], 0.5)  # what is measured is what happens in a time
    assert [timeslices(tid) for tid in tids] == before


def asleep(tid):
    return Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def timeslices(tid):
    """Return how often a thread has been given a processor (Documentation/scheduler/sched-stats.rst)."""
    return int(Path(f"/proc/self/task/{tid}/schedstat").read_text().split()[2])


def test_a_shortage_of_descriptors_does_not_close_the_socket(connect, path, netdev, wait_until, caplog, exhausted):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as early:
        with exhausted():
            early.connect(path)
            wait_until(lambda: "nobody can be accepted" in caplog.text)
            assert netdev.port is None
        wait_until(lambda: netdev.port is not None)
    wait_until(lambda: netdev.port is None)
    assert exchange(connect(), [frame(1)]) == [frame(1)]
