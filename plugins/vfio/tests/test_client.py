"""Our client against our server and a real PCI device: everything a hypervisor does, from the other side."""

import contextlib
import errno
import itertools
import os
import socket
import struct
import threading
import time

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.client import Channel, GuestMemory, VfioUserClient, migrate
from mdevkit_vfio.ops import SparseArea
from mdevkit_vfio.proto import Command
from mdevkit_vfio.uapi import FEATURE_GET, FEATURE_SET, Feature, Irq, IrqFlag, IrqSet, MigrationFlag, MigrationState, Region


@pytest.fixture
def card(make_card):
    return make_card()


@pytest.fixture
def card_server(serve, card):
    return serve(card, "card")


@pytest.fixture
def client(card_server):
    with VfioUserClient.connect(card_server.path) as client:
        yield client


@pytest.fixture
def mapped(serve, make_card):
    with VfioUserClient.connect(serve(make_card(mapped=True), "mapped").path) as client:
        yield client


# -- connecting


def test_connecting_agrees_on_a_version(client):
    assert (client.version.major, client.version.minor) == (0, 2)
    assert client.version.capabilities.max_msg_fds == 16
    assert client.version.capabilities.max_dma_maps == 1024
    assert client.max_transfer == 1 << 20


def test_a_client_may_propose_what_it_likes(card_server):
    with VfioUserClient.connect(str(card_server.path), minor=0, capabilities=proto.Capabilities()) as client:
        assert client.version.minor == 0


@pytest.mark.parametrize("name", ["missing", "x" * 200])
def test_connecting_to_nothing_says_so(folder, no_leaks, name):
    with pytest.raises(MdevError, match="cannot connect to"):
        VfioUserClient.connect(folder / name)


def test_connecting_to_a_busy_device_says_so(card_server, client):
    with pytest.raises(MdevError, match="the server refuses VERSION: EBUSY") as caught:
        VfioUserClient.connect(card_server.path)
    assert caught.value.errno == errno.EBUSY


def test_a_client_may_be_closed_twice(card_server):
    client = VfioUserClient.connect(card_server.path)
    client.close()
    client.close()
    with pytest.raises(MdevError, match="the connection is closed") as caught:
        client.reset()
    assert caught.value.errno == errno.ENOTCONN


def test_a_server_that_goes_away_is_noticed(card_server, client):
    card_server.close()
    with pytest.raises(MdevError, match="the server is gone") as caught:
        client.reset()
    assert caught.value.errno == errno.ENOTCONN


class Impostor:
    """A server that answers what a test says, and then does `after`."""

    def __init__(self, path, replies, after=lambda sock: sock.recv(1)):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.replies = replies
        self.after = after
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join(5)
        self.listener.close()

    def run(self):
        sock, _ = self.listener.accept()
        with sock:
            for reply in self.replies:
                header, _ = receive(sock)
                sock.sendall(reply(header.id, header.command))
            self.after(sock)


def receive(sock):
    header = proto.Header(*proto.HEADER.unpack(sock.recv(16, socket.MSG_WAITALL)))
    return header, sock.recv(header.size - 16, socket.MSG_WAITALL)


def good(ident, command):
    return proto.reply(ident, command, proto.Version(0, 0).pack())


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (lambda i, c: proto.reply(i, c, proto.Version(1, 0).pack()), errno.EPROTO),
        (lambda i, c: proto.reply(i, c, proto.Version(0, 3).pack()), errno.EPROTO),
        (lambda i, c: proto.reply(i, c, b"\0"), errno.EINVAL),
        (lambda i, c: proto.error_reply(i, c, 0), errno.EIO),
        (lambda i, c: proto.HEADER.pack(i, c, 15, 1, 0), errno.EPROTO),
        (lambda i, c: proto.HEADER.pack(i, c, 1 << 30, 1, 0), errno.EPROTO),
        (lambda i, c: proto.reply(i + 1, c, proto.Version(0, 0).pack()), errno.ETIMEDOUT),
        (lambda i, c: good(i, c)[:20], errno.ETIMEDOUT),
    ],
)
def test_a_server_that_answers_nonsense_is_refused(folder, no_leaks, answer, number):
    with Impostor(folder / "socket", [answer]):
        with pytest.raises(MdevError) as caught:
            VfioUserClient.connect(folder / "socket", timeout=0.3)
        assert caught.value.errno == number


def test_a_read_that_returns_too_little_is_an_error(folder, no_leaks):
    replies = [
        good,
        lambda i, c: proto.reply(i, c, struct.pack("=IIIIQQ", 32, 3, 0, 0, 4096, 0)),
        lambda i, c: proto.reply(i, c, proto.Access(0, 0, 2).pack() + b"ab"),
    ]
    with Impostor(folder / "socket", replies):
        with VfioUserClient.connect(folder / "socket") as client:
            with pytest.raises(MdevError, match="2 bytes for a read of 4"):
                client.region(0).read(0, 4)


# -- information and regions


def test_information(client):
    info = client.info
    assert (info.num_regions, info.num_irqs) == (9, 5)
    assert client.region(0).size == 4096
    assert client.region(0).index == 0
    assert client.region(2).size == 0
    assert client.config.size == 256
    assert client.irq_info(Irq.MSI).count == 4
    assert client.irq_info(Irq.INTX).flags & IrqFlag.MASKABLE
    with pytest.raises(MdevError, match="the server refuses DEVICE_GET_REGION_INFO: EINVAL"):
        client.region(9)


def test_registers(client):
    assert client.config.read_int(0, 4) == 0x56781234
    assert client.config.read_int(0, 2) == 0x1234
    bar = client.region(0)
    bar.write_int(0x40, 4, 0xDEADBEEF)
    assert [bar.read_int(0x40, size) for size in (1, 2, 4, 8)] == [0xEF, 0xBEEF, 0xDEADBEEF, 0xDEADBEEF]
    bar.write_int(0x44, 2, 0x1234, posted=True)
    assert bar.read(0x40, 8) == bytes.fromhex("efbeadde34120000")
    with pytest.raises(MdevError, match="the server refuses REGION_READ: EINVAL"):
        bar.read_int(4096, 1)


def test_long_accesses_are_several_messages(card_server):
    with VfioUserClient.connect(card_server.path, capabilities=proto.Capabilities(max_data_xfer_size=48)) as client:
        assert client.max_transfer == 48
        client.region(0).write(0x40, bytes(range(128)))
        assert client.region(0).read(0x40, 128) == bytes(range(128))
        assert client.region(0).read(0, 0) == b""
        reply = client.transact(Command.REGION_READ, proto.Access(0, 0, 49).pack())
        assert reply.error == errno.EINVAL


def test_several_writes_in_one_message(client):
    writes = [proto.Write(0, 0x40 + 4 * n, bytes([n] * 4)) for n in range(16)]
    assert client.write_multi(writes) == 16
    assert client.region(0).read(0x40, 64) == b"".join(write.data for write in writes)
    assert client.write_multi([proto.Write(0, 0x40, b"\xaa")], posted=True) == 1
    assert client.region(0).read_int(0x40, 1) == 0xAA


def test_a_mapped_region_is_the_devices_memory(mapped, serve):
    region = mapped.region(1)
    assert region.areas == (SparseArea(0x1000, 0x1000), SparseArea(0x4000, 0x4000))
    assert region.type is None
    with region.map() as first, region.map(region.areas[1]) as second:
        first[0:5] = b"hello"
        second[0x100] = 7
        assert region.read(0x1000, 5) == b"hello"
        assert region.read_int(0x4100, 1) == 7
        region.write(0x1FFF, b"z")
        assert first[0xFFF] == ord("z")
    assert mapped.region(0).areas == ()
    with pytest.raises(MdevError, match="region 0 cannot be mapped") as caught:
        mapped.region(0).map()
    assert caught.value.errno == errno.ENODEV


def test_the_file_behind_a_region_cannot_be_resized(mapped):
    fd = mapped.region(1).fd
    for size in (0, 0x1000, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def test_reset_and_features(client):
    client.region(0).write_int(0x40, 4, 1)
    client.reset()
    assert client.region(0).read_int(0x40, 4) == 0
    assert client.can(Feature.MIGRATION, FEATURE_GET)
    assert not client.can(Feature.MIGRATION, FEATURE_SET)
    assert not client.can(Feature.DMA_LOGGING_START)
    reply = client.transact(999)
    assert (reply.ok, reply.error, reply.payload) == (False, errno.EINVAL, b"")


def test_requests_of_many_threads_do_not_mix(client):
    bar = client.region(0)
    failures = []

    def use(number):
        at = 0x40 + 8 * number
        for value in range(200):
            bar.write_int(at, 4, value << 8 | number)
            if bar.read_int(at, 4) != value << 8 | number:
                failures.append((number, value))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# -- interrupts


def test_an_interrupt_line_is_signalled_until_it_is_dealt_with(client):
    (line,) = client.arm(Irq.INTX)
    assert line.wait(0) == 0
    client.region(0).write_int(0, 1, 1)
    assert line.wait(1) == 1
    assert line.wait(0.05) == 0
    client.unmask(Irq.INTX)
    assert line.wait(1) == 1
    client.region(0).write_int(0, 1, 0)
    client.unmask(Irq.INTX)
    assert line.wait(0.05) == 0


def test_a_masked_line_waits(client):
    (line,) = client.arm(Irq.INTX)
    client.mask(Irq.INTX)
    client.region(0).write_int(0, 1, 1)
    assert line.wait(0.05) == 0
    client.unmask(Irq.INTX)
    assert line.wait(1) == 1


def test_messages(client):
    vectors = client.arm(Irq.MSI, 4)
    client.region(0).write_int(4, 1, 2)
    assert [vector.wait(1 if vector.number == 2 else 0) for vector in vectors] == [0, 0, 1, 0]
    client.trigger(Irq.MSI, 1, 2)
    assert vectors[1].wait(1) == 1
    assert vectors[2].wait(1) == 1
    client.set_irqs(Irq.MSI, IrqSet.DATA_BOOL | IrqSet.ACTION_TRIGGER, 0, 3, bools=(True, False, False))
    assert [vector.wait(0.05) for vector in vectors[:3]] == [1, 0, 0]
    client.disarm(Irq.MSI)
    client.region(0).write_int(4, 1, 2)
    client.arm(Irq.MSI, 1)


def test_many_messages_are_armed_in_parts_and_again(mapped):
    vectors = mapped.arm(Irq.MSIX, 100)
    assert [vector.number for vector in vectors] == list(range(100))
    mapped.trigger(Irq.MSIX, 99)
    assert vectors[99].wait(1) == 1
    again = mapped.arm(Irq.MSIX, 1, 99)
    mapped.trigger(Irq.MSIX, 99)
    assert again[0].wait(1) == 1


def test_what_cannot_be_armed_leaves_nothing(client, open_files):
    before = open_files()
    with pytest.raises(MdevError, match="DEVICE_SET_IRQS: EINVAL"):
        client.arm(Irq.MSI, 5)
    assert open_files() == before


# -- DMA


def copy(client, source, target, length):
    (done,) = client.arm(Irq.MSI, 1)
    bar = client.region(0)
    bar.write(0x10, struct.pack("<QQI", source, target, length))
    bar.write_int(0x24, 4, 1)
    assert done.wait(5) == 1
    return bar.read_int(8, 4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_device_copies_guest_memory(client, shared):
    memory = client.dma_map(0x100000, 0x40000, shared=shared)
    data = os.urandom(100_000)
    memory.write(0x101000, data)
    assert copy(client, 0x101000, 0x120001, len(data)) == 0
    assert memory.read(0x120001, len(data)) == data
    assert memory.data[0x20001:0x20005] == data[:4]


def test_shared_and_private_memory_together(client):
    private = client.dma_map(0x1000, 0x1000, shared=False)
    shared = client.dma_map(0x2000, 0x1000)
    private.write(0x1F00, b"p" * 256)
    shared.write(0x2000, b"s" * 256)
    assert copy(client, 0x1F00, 0x2800, 512) == 0
    assert shared.read(0x2800, 512) == b"p" * 256 + b"s" * 256


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_device_may_not_do(client, shared):
    client.dma_map(0x1000, 0x1000, shared=shared, writable=False)
    client.dma_map(0x2000, 0x1000, shared=shared, readable=False)
    assert copy(client, 0x1000, 0x2000, 16) == 0
    assert copy(client, 0x1000, 0x1800, 16) == errno.EACCES
    assert copy(client, 0x2000, 0x2800, 16) == errno.EACCES
    assert copy(client, 0x1000, 0x2FF8, 16) == errno.EFAULT
    assert copy(client, 0x8000, 0x2000, 16) == errno.EFAULT


def test_unmapped_memory_is_out_of_reach(client):
    memory = client.dma_map(0x1000, 0x1000)
    client.dma_unmap(memory)
    assert copy(client, 0x1000, 0x1800, 16) == errno.EFAULT
    for number in range(4):
        client.dma_map(number << 12, 0x1000, shared=bool(number % 2))
    client.dma_unmap_all()
    assert copy(client, 0x1000, 0x1800, 16) == errno.EFAULT


def test_memory_that_is_refused_is_closed(client, open_files):
    client.dma_map(0x1000, 0x1000)
    before = open_files()
    with pytest.raises(MdevError, match="DMA_MAP: EEXIST"):
        client.dma_map(0x1000, 0x1000)
    assert open_files() == before


def test_guest_memory_has_bounds():
    memory = GuestMemory(0x1000, 0x1000, shared=False)
    memory.write(0x1FFF, b"z")
    assert memory.read(0x1FFF, 1) == b"z"
    for iova, count in ((0xFFF, 1), (0x1FFF, 2), (0x1000, -1)):
        with pytest.raises(MdevError, match="are outside 0x1000") as caught:
            memory.read(iova, count)
        assert caught.value.errno == errno.EFAULT
    memory.close()
    for access in (lambda: memory.read(0x1000, 1), lambda: memory.write(0x1000, b"x")):
        with pytest.raises(MdevError, match="the memory at 0x1000 is closed"):
            access()


def test_a_client_answers_only_what_it_can(folder, no_leaks):
    """What a server may ask, and what it is told when it asks for something else."""
    answers = []
    questions = [
        (Command.DMA_READ, proto.DmaAccess(0x1000, 4).pack()),
        (Command.DMA_WRITE, proto.DmaAccess(0x1004, 2).pack() + b"ab"),
        (Command.DMA_READ, proto.DmaAccess(0x5000, 4).pack()),
        (Command.DMA_READ, b"short"),
        (Command.DEVICE_RESET, b""),
    ]

    def ask_all(ident, command):
        return proto.reply(ident, command) + b"".join(proto.message(n, c, p) for n, (c, p) in enumerate(questions))

    def collect(sock):
        for _ in questions:
            header, payload = receive(sock)
            answers.append((header.id, header.error, payload))
        done.set()
        sock.recv(1)

    done = threading.Event()
    with Impostor(folder / "socket", [good, ask_all], collect):
        with VfioUserClient.connect(folder / "socket") as client:
            memory = client.dma_map(0x1000, 0x1000, shared=False)
            assert done.wait(5)
            assert memory.read(0x1004, 2) == b"ab"
    assert answers == [
        (0, 0, proto.DmaAccess(0x1000, 4).pack() + bytes(4)),
        (1, 0, proto.DmaAccess(0x1004, 2).pack()),
        (2, errno.EFAULT, b""),
        (3, errno.EINVAL, b""),
        (4, errno.EINVAL, b""),
    ]


# -- migration


@pytest.mark.parametrize("pre_copy", [False, True])
def test_a_device_moves_to_another(client, make_card, serve, pre_copy):
    state = os.urandom(128)
    client.region(0).write(0x40, state)
    assert client.migration.flags == MigrationFlag.STOP_COPY | MigrationFlag.PRE_COPY
    assert client.migration.data_size == 260
    with VfioUserClient.connect(serve(make_card("other"), "other").path) as other:
        stream = migrate(client, other, pre_copy=pre_copy)
        assert stream[:4] == b"card"
        assert len(stream) == 260
        assert other.region(0).read(0x40, 128) == state
        assert (client.migration.state, other.migration.state) == (MigrationState.STOP, MigrationState.RUNNING)


def test_a_broken_stream_is_refused(client):
    client.migration.state = MigrationState.RESUMING
    client.migration.write(b"nonsense" * 32 + b"1234")
    with pytest.raises(MdevError, match="DEVICE_FEATURE: EINVAL"):
        client.migration.state = MigrationState.RUNNING
    client.reset()
    assert client.migration.state is MigrationState.RUNNING


def test_a_state_nobody_walks_to_is_refused(client):
    with pytest.raises(MdevError, match="DEVICE_FEATURE: EINVAL"):
        client.migration.state = MigrationState.ERROR
    with pytest.raises(MdevError, match="MIG_DATA_READ: EINVAL"):
        client.migration.read(10)
    client.migration.state = MigrationState.STOP_COPY
    assert client.migration.read(2) + b"".join(client.migration.stream(100))[:2] == b"card"


# -- closing while something is under way


def test_closing_ends_a_wait_for_a_reply(serve, recorder, until):
    entered, leave = threading.Event(), threading.Event()

    def during():
        entered.set()
        leave.wait(5)

    recorder.during["reset"] = during
    server = serve(recorder)
    client = VfioUserClient.connect(server.path)
    errors = []

    def reset():
        try:
            client.reset()
        except MdevError as error:
            errors.append(error.errno)

    thread = threading.Thread(target=reset)
    thread.start()
    assert entered.wait(5)
    client.close()
    thread.join(5)
    leave.set()
    assert errors == [errno.ENOTCONN]


def test_a_device_that_takes_too_long_is_a_time_out(serve, recorder):
    server = serve(recorder)
    leave = threading.Event()
    recorder.during["reset"] = lambda: leave.wait(5)
    with VfioUserClient.connect(server.path, timeout=0.2) as client:
        began = time.monotonic()
        with pytest.raises(MdevError, match=r"no reply within 0.2 s") as caught:
            client.reset()
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - began < 2
        leave.set()
        assert client.region(Region.BAR0).read(0, 4) == bytes(range(4))


def test_a_reply_that_comes_after_the_time_out_is_not_the_next_requests(no_leaks, eventfd, monkeypatch):
    """It comes when the time is over, and before the request is forgotten: another thread reads then."""
    ours, server = socket.socketpair()
    with contextlib.closing(Channel(ours, 0.05)) as channel, server:
        wait = channel._await

        def wait_in_vain(ident):
            with pytest.raises(MdevError, match="no reply within") as caught:
                wait(ident)
            header, _ = receive(server)
            socket.send_fds(server, [proto.reply(header.id, header.command, b"late")], [eventfd()])
            channel._read()
            raise caught.value

        monkeypatch.setattr(channel, "_ids", itertools.count(7))
        monkeypatch.setattr(channel, "_await", wait_in_vain)
        with pytest.raises(MdevError, match="no reply within"):
            channel.request(Command.DEVICE_RESET)
        assert not channel._replies
        monkeypatch.setattr(channel, "_ids", itertools.count(7))
        monkeypatch.setattr(channel, "_await", wait)
        with pytest.raises(MdevError, match="no reply within"):
            channel.request(Command.DEVICE_RESET)
