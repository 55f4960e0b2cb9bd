"""Clients that send anything, vanish anywhere, and take their memory away: it costs them their device, and nobody else anything."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import tempfile
import time

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.memory import MAX_MAPPED
from mdevkit_virtio.ops import Status
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.descriptors import check_eventfd
from mdevkit_virtio.vhost.frontend import FEATURES, PROTOCOL, GuestMemory
from mdevkit_virtio.vhost.proto import MemRegion, ProtocolFeature, Request, VringAddr, VringFd, VringState

SPLIT = FEATURES & ~Feature.RING_PACKED


@pytest.fixture
def neighbour(serve, connect, loopback):
    """Another device of this process with a client, which notices nothing; calling it carries frames over it."""
    net = connect(serve(loopback(name="neighbour")))
    checks = [net.check]
    del net
    checks[0](50)
    yield lambda count: checks[0](count)
    checks.pop()(50)


@pytest.fixture
def things(later, tmp_path):
    """One descriptor of each kind a client could send in the place of another."""
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 1 << 20)
    memory = os.memfd_create("memory")
    os.ftruncate(memory, 1 << 20)
    event, (read, write), (left, right) = os.eventfd(0), os.pipe(), socket.socketpair()
    null, folder = os.open("/dev/null", os.O_RDWR), os.open(tmp_path, os.O_RDONLY)
    read_only = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    made = {"file": file, "memfd": memory, "eventfd": event, "pipe": write, "socket": left.fileno(), "null": null, "folder": folder}
    made |= {"read-only memfd": read_only}
    for fd in (file, memory, event, read, write, null, folder, read_only):
        later(lambda fd=fd: os.close(fd))
    later(left.close)
    later(right.close)
    return made


# -- descriptors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR], ids=lambda r: r.name)
def test_only_eventfds_are_eventfds(serve, client, things, request_):
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    for kind, fd in things.items():
        if kind == "eventfd":
            frontend.set_fd(request_, 0, fd)
            continue
        with pytest.raises(MdevError, match="refused"):
            frontend.set_fd(request_, 0, fd)
        assert "the descriptor for a queue is not an eventfd but " in served.refusals()[-1]


@pytest.mark.parametrize("request_", [Request.ADD_MEM_REG, Request.SET_MEM_TABLE], ids=lambda r: r.name)
def test_only_memory_is_memory(serve, client, things, request_):
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    region = MemRegion(0, 1 << 20, 1 << 30)
    payload = region.pack() if request_ == Request.ADD_MEM_REG else proto.pack_mem_table([region])
    for kind, fd in things.items():
        if kind == "memfd":
            frontend.tell(request_, payload, [fd])
            frontend.tell(Request.REM_MEM_REG, region.pack(), [fd])
            continue
        with pytest.raises(MdevError, match="refused"):
            frontend.tell(request_, payload, [fd])
        assert "guest memory" in served.refusals()[-1]


def test_only_memory_is_a_log(serve, client, things):
    for kind, fd in things.items():
        served = serve()
        frontend = client(served)
        frontend.negotiate()
        ask = (Request.SET_LOG_BASE, proto.LogBase(4096, 0).pack(), [fd])
        if kind == "memfd":
            assert frontend.ask(*ask).payload == proto.pack_u64(0)
        else:
            with pytest.raises(MdevError) as caught:
                frontend.ask(*ask)
            assert caught.value.errno == errno.ENOTCONN
            assert "guest memory" in served.refusals()[-1]
        frontend.close()
        served.server.close()


@pytest.mark.parametrize(
    ("region", "words"),
    [
        (MemRegion(0, 2 << 20, 0), "has 1048576 bytes, the region ends at 2097152"),
        (MemRegion(0, 4096, 0, 1 << 20), "has 1048576 bytes, the region ends at 1052672"),
        (MemRegion((1 << 64) - 4096, 4096, 0), "is not possible"),
        (MemRegion(0, 4096, (1 << 64) - 4096), "is not possible"),
        (MemRegion(0, 4096, 0, (1 << 63) - 4096), "is not possible"),
        (MemRegion(0, 0, 0), "is not possible"),
        (MemRegion(0x8000, 4096, 0x9000), "overlaps"),
        (MemRegion(0x18000, 4096, 0x8000), "overlaps"),
    ],
    ids=["too-long", "behind-the-end", "guest-wraps", "user-wraps", "offset-wraps", "empty", "overlap", "user-overlap"],
)
def test_regions_that_cannot_be(serve, client, things, region, words):
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    frontend.tell(Request.ADD_MEM_REG, MemRegion(0x8000, 0x1000, 0x8000).pack(), [things["memfd"]])
    with pytest.raises(MdevError, match="refused"):
        frontend.tell(Request.ADD_MEM_REG, region.pack(), [things["memfd"]])
    assert words in served.refusals()[-1]


def test_regions_are_limited(serve, client, things):
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    for n in range(1024):
        frontend.tell(Request.ADD_MEM_REG, MemRegion(n << 16, 4096, n << 16).pack(), [things["memfd"]])
    with pytest.raises(MdevError, match="refused"):
        frontend.tell(Request.ADD_MEM_REG, MemRegion(1024 << 16, 4096, 1024 << 16).pack(), [things["memfd"]])
    assert "the client shares 1025 regions, 1024 are the most" in served.refusals()[-1]


@pytest.fixture
def sparse(later):
    """A file of more bytes than a client may share, which cost nothing."""
    fd = os.memfd_create("sparse")
    later(lambda: os.close(fd))
    os.ftruncate(fd, 4 * MAX_MAPPED)
    return fd


TOO_MUCH = f"the client shares {MAX_MAPPED + 4096:#x} bytes, 0x10000000000 are the most"


@pytest.mark.parametrize("request_", [Request.ADD_MEM_REG, Request.SET_MEM_TABLE], ids=lambda r: r.name)
def test_memory_is_limited(serve, client, neighbour, sparse, request_):
    """What one client has us map is address space that every other device of the process lacks."""
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    most, more = MemRegion(0, MAX_MAPPED, 0), MemRegion(2 * MAX_MAPPED, 4096, 2 * MAX_MAPPED, MAX_MAPPED)
    frontend.tell(Request.SET_MEM_TABLE, proto.pack_mem_table([most]), [sparse])
    one = request_ == Request.ADD_MEM_REG
    with pytest.raises(MdevError, match="refused"):
        frontend.tell(request_, more.pack() if one else proto.pack_mem_table([most, more]), [sparse] * (2 - one))
    assert (str(served.exchanges[-1].error), served.exchanges[-1].error.errno) == (TOO_MUCH, errno.ENOSPC)
    frontend.tell(Request.REM_MEM_REG, most.pack())
    frontend.tell(Request.ADD_MEM_REG, more.pack(), [sparse])


def test_the_log_is_limited(serve, client, sparse):
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    with pytest.raises(MdevError) as caught:
        frontend.ask(Request.SET_LOG_BASE, proto.LogBase(MAX_MAPPED + 4096, 0).pack(), [sparse])
    assert caught.value.errno == errno.ENOTCONN
    assert served.refusals()[-1] == TOO_MUCH


def test_too_many_descriptors(serve, client, things):
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    fd = things["eventfd"]
    with pytest.raises(MdevError, match="refused"):
        frontend.tell(Request.SET_VRING_KICK, VringFd(0, True).pack(), [fd] * 2)
    assert "SET_VRING_KICK: 2 descriptors, 1 announced" in served.refusals()[-1]
    with pytest.raises(MdevError, match="refused"):
        frontend.tell(Request.SET_VRING_KICK, VringFd(0, False).pack(), [fd])
    assert "SET_VRING_KICK: 1 descriptors, 0 announced" in served.refusals()[-1]
    with pytest.raises(MdevError, match="refused"):
        frontend.tell(Request.SET_VRING_KICK, VringFd(0, True).pack(), [fd] * 100)
    assert "it has more than 8 descriptors, or ours ran out" in served.refusals()[-1]


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ((1, 0, 0), "flags 0x0 are not those of version 1"),
        ((1, 2, 0), "flags 0x2 are not those of version 1"),
        ((5, 1, 1 << 31), "a payload of 2147483648 bytes, 268 are the most"),
        ((24, 1, 269), "a payload of 269 bytes, 268 are the most"),
        ((1, 5, 0), "it is a reply to nothing"),
    ],
)
def test_headers_that_cannot_be_right_end_the_connection(serve, client, neighbour, caplog, header, words):
    served = serve()
    frontend = client(served)
    frontend.channel.send(struct.pack("=III", *header))
    assert frontend.channel.closed_by_backend()
    assert words in caplog.text


def test_a_refusal_nobody_would_hear_ends_the_connection(serve, client):
    served = serve()
    frontend = client(served)
    frontend.channel.send(proto.message(Request.SET_VRING_NUM, VringState(0, 3000).pack()))
    assert frontend.channel.closed_by_backend()
    assert "has 256 descriptors at most, not 3000" in served.refusals()[-1]


def messages(net):
    """Return what sets a device up, message by message, with its descriptors."""
    shared, (pair,) = net.frontend.shared, net.pairs
    yield proto.message(Request.SET_OWNER), []
    yield proto.message(Request.SET_PROTOCOL_FEATURES, proto.pack_u64(net.frontend.protocol)), []
    yield proto.message(Request.SET_FEATURES, proto.pack_u64(net.frontend.features)), []
    yield proto.message(Request.SET_STATUS, proto.pack_u64(0xB)), []
    yield proto.message(Request.SET_MEM_TABLE, proto.pack_mem_table(shared.regions)), [net.memory.fd]
    for queue in pair.queues:
        index, ring = queue.index, queue.ring
        desc, used, avail = (shared.user(at) for at in (ring.desc, ring.device, ring.driver))
        yield proto.message(Request.SET_VRING_NUM, VringState(index, ring.num).pack()), []
        yield proto.message(Request.SET_VRING_ADDR, VringAddr(index, desc, used, avail).pack()), []
        yield proto.message(Request.SET_VRING_CALL, VringFd(index, True).pack()), [queue.call]
        yield proto.message(Request.SET_VRING_KICK, VringFd(index, True).pack()), [queue.kick]
        yield proto.message(Request.SET_VRING_ENABLE, VringState(index, 1).pack()), []
    yield proto.message(Request.SET_STATUS, proto.pack_u64(0xF)), []
    yield proto.message(Request.GET_VRING_BASE, VringState(1).pack()), []


def test_a_client_may_vanish_at_any_message(serve, connect, client, neighbour, until):
    """And in the middle of each, and of its header."""
    served = serve()
    net = connect(served, features=SPLIT, started=False)
    net.frontend.close()
    script = list(messages(net))
    for count in range(len(script)):
        for cut in (0, 1, proto.HEADER_SIZE, len(script[count][0]) - 1):
            frontend = client(served)
            for data, fds in script[:count]:
                frontend.channel.send(data, fds)
            data, fds = script[count]
            if cut:
                frontend.channel.send(data[:cut], fds)
            frontend.close()
    until(lambda: served.server.client is None)
    assert served.ops.get_status() == 0
    net.frontend = client(served)
    net.frontend.negotiate(SPLIT)
    net.frontend.share(net.memory)
    for queue in net.queues:
        queue.base = 0
    net.start().check(20)


def test_messages_may_come_byte_by_byte_and_all_at_once(serve, connect, client):
    served = serve()
    net = connect(served, features=SPLIT, started=False)
    net.frontend.close()
    script = list(messages(net))[:-1]
    frontend = net.frontend = client(served)
    for data, fds in script:
        frontend.channel.send(data[:1], fds)
        for at in range(1, len(data)):
            frontend.channel.send(data[at : at + 1])
    net.check(20)
    frontend.close()
    frontend = net.frontend = client(served)
    # Those without descriptors go together with the next one that has some.
    glued = b""
    for data, fds in script:
        glued += data
        if fds:
            frontend.channel.send(glued[: -len(data)])
            frontend.channel.send(data, fds)
            glued = b""
    frontend.channel.send(glued)
    net.check(20)


def garbage(rng, things):
    """Return a message that may be anything, mostly of a right shape."""
    request = rng.choice([*Request, rng.getrandbits(32)])
    size = rng.choice([0, 4, 8, 8, 8, 12, 16, 32, 40, 40, rng.randrange(269)])
    small = [rng.choice([0, 1, 2, 64, 256, rng.getrandbits(16), rng.getrandbits(32)]) for _ in range(size // 4 + 1)]
    payload = struct.pack(f"={len(small)}I", *small)[:size]
    flags = rng.choice([0, 0, proto.NEED_REPLY, proto.NEED_REPLY])
    fds = [rng.choice(list(things.values())) for _ in range(rng.choice([0, 0, 1, 1, 2, 8]))]
    return proto.message(request, payload, flags), fds


@pytest.mark.parametrize("seed", range(6))
def test_garbage(serve, client, connect, things, neighbour, seed):
    """Nothing a client sends does more than end its connection."""
    served = serve()
    rng = random.Random(seed)
    for _ in range(40):
        frontend = client(served, timeout=5)
        frontend.set_protocol_features(PROTOCOL)
        with contextlib.suppress(MdevError):
            for _ in range(50):
                frontend.channel.send(*garbage(rng, things))
        frontend.close()
    connect(served).check(20)


@pytest.mark.parametrize("seed", range(3))
def test_noise(serve, client, connect, neighbour, seed):
    served = serve()
    rng = random.Random(seed)
    for _ in range(50):
        frontend = client(served)
        with contextlib.suppress(MdevError):
            frontend.channel.send(rng.randbytes(rng.randrange(1, 2000)))
        frontend.close()
    connect(served).check(20)


def test_a_client_that_reads_no_replies(serve, client, neighbour, caplog, until):
    served = serve()
    frontend = client(served)
    ask = proto.message(Request.GET_FEATURES) * 64
    with contextlib.suppress(MdevError):
        while True:
            frontend.channel.send(ask)
    until(lambda: served.server.client is None)
    assert "does not read its replies" in caplog.text


def test_a_flood_leaves_others_their_rate(serve, client, neighbour):
    served = serve()
    frontend = client(served)
    frontend.set_protocol_features(PROTOCOL & ~ProtocolFeature.REPLY_ACK)
    ask = proto.message(Request.SET_VRING_BASE, VringState(0).pack())
    sock = socket.socket(fileno=os.dup(frontend.channel.fileno()))
    with sock:
        sock.setblocking(False)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(ask * 100)
            neighbour(5)
        # Far from what a process could carry out in a second.
        assert len(served.exchanges) < 8000


def test_a_client_that_does_not_read_its_channel(serve, connect):
    """Changes of the configuration are dropped when there is no room for them."""
    served = serve()
    net = connect(served)
    channel = net.frontend.open_backend_channel()
    for mtu in range(2000):
        served.ops.update_config(mtu=mtu + 100)
        net.frontend.get_status()
    net.check()
    channel.close()


def test_an_eventfd_that_is_full_stops_nobody(serve, connect):
    """Interrupts that cannot be counted are pending already; our own drains keep nobody waiting."""
    served = serve()
    net = connect(served, features=SPLIT & ~Feature.EVENT_IDX)
    for queue in net.queues:
        os.eventfd_write(queue.call, 0xFFFFFFFFFFFFFFFE)
        os.eventfd_write(queue.err, 0xFFFFFFFFFFFFFFFE)
        os.set_blocking(queue.call, True)
        os.set_blocking(queue.err, True)
        queue.ring.want_signals(True)
    frames = [b"frame" * 20] * 200
    came = 0
    sent = 0
    deadline = time.monotonic() + 10
    while came < len(frames):
        assert time.monotonic() < deadline
        sent += net.pairs[0].send(frames[sent:])
        came += len(net.pairs[0].receive())
    served.server.close()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_memory_that_is_truncated_breaks_its_own_device(serve, connect, neighbour, packed):
    served = serve()
    net = connect(served, features=FEATURES if packed else SPLIT, sealed=False)
    net.check(20)
    os.ftruncate(net.memory.fd, 0)
    os.eventfd_write(net.pairs[0].tx.kick, 1)
    assert select.select([net.pairs[0].tx.err], [], [], 10)[0]
    assert net.frontend.get_status() & Status.NEEDS_RESET
    # Its client may begin again, with other memory.
    net.frontend.set_status(0)
    assert net.frontend.get_status() == 0
    net.frontend.close()
    connect(served).check(20)


def test_memory_that_is_truncated_before_the_rings_start(serve, connect, neighbour):
    served = serve()
    net = connect(served, features=SPLIT, sealed=False, started=False)
    os.ftruncate(net.memory.fd, 0)
    with pytest.raises(MdevError, match="refused"):
        net.start()
    assert "the memory it shared has been truncated" in served.refusals()[-1]


def test_a_log_that_is_truncated_breaks_its_own_device(serve, connect, neighbour, later, until):
    served = serve()
    net = connect(served, features=SPLIT)
    fd = os.memfd_create("log")
    later(lambda: os.close(fd))
    os.ftruncate(fd, 4096)
    net.frontend.ask(Request.SET_LOG_BASE, proto.LogBase(4096, 0).pack(), [fd])
    os.ftruncate(fd, 0)
    net.frontend.set_features(net.frontend.features | proto.F_LOG_ALL)
    net.pairs[0].send([b"x" * 60] * 10)
    until(lambda: served.ops.get_status() & Status.NEEDS_RESET)


def test_a_log_that_is_too_short_breaks_its_own_device(serve, connect, neighbour, page_log, until):
    served = serve()
    net = connect(served, features=SPLIT, num=256)
    # Bits for 64 pages; the receive buffers alone have 128.
    net.frontend.start_log(page_log(64 << 12), rings=False)

    def broken():
        net.pairs[0].send([b"x" * 60])
        net.pairs[0].receive()
        return served.ops.get_status() & Status.NEEDS_RESET

    until(broken)


def test_what_an_eventfd_is(things):
    with pytest.raises(MdevError, match="not an eventfd but /dev/null") as caught:
        check_eventfd(things["null"])
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(MdevError, match="not an eventfd but descriptor -1"):
        check_eventfd(-1)


def test_a_file_that_looks_like_an_eventfd():
    """Its name on disk cannot be the kernel's."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/anon_inode:[eventfd]", "wb") as file, pytest.raises(MdevError):  # noqa: PTH123
        check_eventfd(file.fileno())


def test_guest_memory_is_not_kept(serve, connect, until):
    """Nothing of a client's memory stays mapped when it has gone."""
    served = serve()
    net = connect(served)
    net.check(5)
    inode = os.fstat(net.memory.fd).st_ino

    def mapped():
        with open("/proc/self/maps", encoding="ascii") as maps:  # noqa: PTH123
            return sum(str(inode) in line.split()[4:5] for line in maps)

    before = mapped()
    net.frontend.close()
    until(lambda: served.server.client is None)
    until(lambda: mapped() < before)
    assert mapped() == 1  # ours
    assert isinstance(net.memory, GuestMemory)
