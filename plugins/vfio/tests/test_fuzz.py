"""Random and mutated messages: an error or a valid reply to each, and a device that works afterwards."""

import contextlib
import errno
import itertools
import logging
import os
import random
import socket
import struct
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.framing import CAPACITY, Inbox, PeerGoneError
from mdevkit_vfio.proto import Command
from mdevkit_vfio.uapi import Irq, IrqSet

MESSAGES = 10_000
BATCH = 20
SYNC = 0xFFFF

PARSERS = [
    proto.Version.parse,
    proto.DmaUnmap.parse,
    proto.FeatureRequest.parse,
    proto.parse_device_info,
    proto.parse_device_info_request,
    proto.parse_io_fds,
    proto.parse_io_fds_request,
    proto.parse_irq_info,
    proto.parse_irq_info_request,
    proto.parse_mig_state,
    proto.parse_region_info,
    proto.parse_region_info_request,
    proto.parse_region_read,
    proto.parse_u64,
    lambda data: list(proto.parse_write_multi(data)),
    proto.parse_write_multi_reply,
    lambda data: proto.DmaMap.parse(data, 0),
    lambda data: proto.DmaMap.parse(data, 1),
    lambda data: proto.SetIrqs.parse(data, 0, (1, 4, 300, 1, 1)),
    lambda data: proto.SetIrqs.parse(data, 2, (1, 4, 300, 1, 1)),
    lambda data: proto.parse_dma_access(Command.DMA_READ, data, with_data=True),
    lambda data: proto.parse_mig_data(Command.MIG_DATA_WRITE, data, 100),
    lambda data: proto.parse_mig_read(data, 100),
    lambda data: proto.parse_region_data(Command.REGION_WRITE, data),
]

#: Numbers that are on the edge of something.
EDGES = (0, 1, 2, 4, 8, 16, 20, 24, 32, 4095, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@given(
    st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 0xFFFFFFFF)), max_size=12),
    st.binary(max_size=20),
    st.sampled_from(PARSERS),
)
def test_a_parser_returns_a_value_or_says_what_is_wrong(words, rest, parse):
    data = struct.pack(f"={len(words)}I", *words) + rest
    with contextlib.suppress(MdevError):
        parse(data)
        return
    with pytest.raises(MdevError, match=r"\w+: .{10}") as caught:
        parse(data)
    assert caught.value.errno == errno.EINVAL


PIECES = st.lists(
    st.tuples(st.one_of(st.integers(0, 100), st.sampled_from([30000, CAPACITY - 16, CAPACITY - 15, 200_000])), st.integers(0, 3)),
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(PIECES, st.lists(st.one_of(st.integers(1, 50), st.integers(1000, 50_000)), min_size=1))
def test_messages_and_descriptors_arrive_however_they_are_cut(messages, cuts):
    """The first byte of a message carries its descriptors; where the rest is cut does not matter."""
    near, far = socket.socketpair()
    fds = [os.eventfd(0) for _ in range(3)]
    received, cut = [], itertools.cycle(cuts)

    def send():
        for number, (size, count) in enumerate(messages):
            data = proto.message(number, number, bytes([number]) * size)
            sent = socket.send_fds(far, [data[: next(cut)]], fds[:count])
            # Cut finely where it matters, at the header, and not a thousand times more.
            for _ in range(40):
                if sent < len(data):
                    sent += far.send(data[sent : sent + next(cut)])
            far.sendall(data[sent:])
        far.close()

    thread = threading.Thread(target=send)
    thread.start()
    inbox = Inbox(near)
    with contextlib.suppress(PeerGoneError):
        while True:
            while (message := inbox.pop()) is not None:
                received.append((bytes(message.payload), len(message.fds), message.complete))
                close_all(message.fds)
            inbox.receive()
    thread.join()
    near.close()
    close_all(fds)
    assert inbox.empty()
    assert received == [(bytes([number]) * size, count, True) for number, (size, count) in enumerate(messages)]


class Fuzzer:
    """Makes messages, from good to wild."""

    def __init__(self, seed, files):
        self.random = random.Random(seed)
        self.files = files

    def number(self, *good):
        """Mostly one of `good`."""
        if self.random.random() < 0.9:
            return self.random.choice(good)
        return self.random.choice([*EDGES, self.random.getrandbits(64)])

    def payload(self, command):
        pick, number = self.random.choice, self.number
        u32 = 0xFFFFFFFF
        match command:
            case Command.VERSION:
                return proto.Version(0, number(0) & 0xFFFF).pack()
            case Command.DMA_MAP:
                iova, size = number(0, 4096, 1 << 20) & ~4095, pick([4096, 8192, 1 << 20])
                return struct.pack("=IIQQQ", 32, number(3) & u32, number(0), iova & (1 << 64) - 1, size)
            case Command.DMA_UNMAP:
                return struct.pack("=IIQQ", 24, pick([0, 0, 2, 1]), number(0, 4096) & (1 << 64) - 1, pick([0, 4096, 8192]))
            case Command.DEVICE_GET_REGION_INFO:
                return struct.pack("=IIIIQQ", number(32, 96) & u32, 0, number(*range(10)) & u32, 0, 0, 0)
            case Command.DEVICE_GET_INFO | Command.DEVICE_GET_REGION_IO_FDS | Command.DEVICE_GET_IRQ_INFO:
                return struct.pack("=IIII", number(16, 64) & u32, 0, number(*range(6)) & u32, number(0) & u32)
            case Command.DEVICE_SET_IRQS:
                index, most = pick([(0, 1), (1, 4), (2, 300), (3, 1), (4, 1)])
                data, count = pick([1, 2, 4, 4]), min(pick([1, 1, 2, 4]), most)
                flags = data | pick([8, 0x10, 0x20, 0x20])
                head = (number(20 + count), number(flags) & u32, number(index) & u32, number(0) & u32, number(count) & u32)
                return struct.pack("=IIIII", head[0] & u32, *head[1:]) + bytes(count if data == IrqSet.DATA_BOOL else 0)
            case Command.REGION_READ | Command.REGION_WRITE:
                count = pick([0, 1, 2, 4, 8, 3, 256, 600, 5000])
                head = struct.pack("=QII", number(0, 4, 0x24, 0x40) & (1 << 64) - 1, number(0, 0, 0, 4, 5, 7) & u32, count)
                return head + (self.random.randbytes(count) if command == Command.REGION_WRITE else b"")
            case Command.REGION_WRITE_MULTI:
                writes = pick([0, 1, 5])
                parts = [struct.pack("=QIIQ", number(0x40), number(0) & u32, pick([1, 4, 8, 8, 9, 0]), 7) for _ in range(writes)]
                return struct.pack("=Q", writes) + b"".join(parts)
            case Command.DEVICE_FEATURE:
                flags = number(1 << 16 | 1, 1 << 16 | 2, 1 << 16 | 9, 2 << 16 | 2, 4 << 16 | 2) & u32
                return struct.pack("=IIIi", number(64) & u32, flags, pick(range(9)), -1)
            case Command.MIG_DATA_READ:
                return struct.pack("=II", number(100) & u32, number(50) & u32)
            case Command.MIG_DATA_WRITE:
                return struct.pack("=II", 12, 4) + b"card"
        return b""

    def mutate(self, data):
        """Flip, cut, or add; a message that is left whole is fuzz too."""
        data = bytearray(data)
        for _ in range(self.random.choice([0, 0, 0, 0, 0, 1, 1, 2, 5])):
            at = self.random.randrange(len(data) + 1)
            match self.random.randrange(4):
                case 0 if data:
                    data[min(at, len(data) - 1)] ^= 1 << self.random.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    data += self.random.randbytes(self.random.randrange(1, 40))
                case 3:
                    data[at : at + 4] = struct.pack("=I", self.random.choice(EDGES))
        return bytes(data)

    def descriptors(self, command, payload):
        """Mostly those that belong to a message."""
        eventfd, memory = self.files[0], self.files[2]
        if self.random.random() < 0.1:
            return [self.random.choice(self.files) for _ in range(self.random.choice([1, 2, 16, 17, 40]))]
        if command == Command.DEVICE_SET_IRQS and len(payload) >= 20 and payload[4] & IrqSet.DATA_EVENTFD:
            return [eventfd] * self.random.choice([0, payload[16] & 0xF])
        return [memory] if command == Command.DMA_MAP and self.random.random() < 0.8 else []

    def message(self, ident):
        """One message with a size that is right; returns it and its descriptors."""
        command = self.random.choice([*Command, *Command, *Command, 0, 14, 19, self.random.getrandbits(16)])
        if self.random.random() < 0.1:
            payload = self.random.randbytes(self.random.randrange(100))
        else:
            payload = self.mutate(self.payload(command))
        flags = self.random.choice([0] * 24 + [proto.NO_REPLY] * 4 + [1, 0x11, 0x20, self.random.getrandbits(32)])
        fds = self.descriptors(command, payload)
        header = proto.HEADER.pack(ident, command, 16 + len(payload), flags, self.random.choice([0, 0, 5]))
        return header + payload, fds


@pytest.fixture
def files(eventfd, memfd):
    """Descriptors a client may think of."""
    reading, writing = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    yield [eventfd(), eventfd(), memfd(1 << 21), memfd(4096), reading, writing, null]
    for fd in (reading, writing, null):
        os.close(fd)


@pytest.fixture
def seed():
    value = int.from_bytes(os.urandom(4), "little")
    yield value
    # Shown by pytest if the test fails.
    sys.stdout.write(f"seed {value}\n")


def nothing(data):
    assert data == b""


CHECKS = {
    Command.DEVICE_GET_INFO: proto.parse_device_info,
    Command.DEVICE_GET_REGION_INFO: proto.parse_region_info,
    Command.DEVICE_GET_REGION_IO_FDS: proto.parse_io_fds,
    Command.DEVICE_GET_IRQ_INFO: proto.parse_irq_info,
    Command.DMA_UNMAP: proto.DmaUnmap.parse,
    Command.REGION_READ: lambda data: proto.parse_region_data(Command.REGION_READ, data),
    Command.REGION_WRITE: proto.parse_region_read,
    Command.REGION_WRITE_MULTI: proto.parse_write_multi_reply,
    Command.DEVICE_FEATURE: proto.FeatureRequest.parse,
    Command.MIG_DATA_READ: lambda data: proto.parse_mig_data(Command.MIG_DATA_READ, data, 1 << 20),
    **dict.fromkeys((Command.DMA_MAP, Command.DEVICE_SET_IRQS, Command.DEVICE_RESET, Command.MIG_DATA_WRITE), nothing),
}


def collect(wire, fuzzer):
    """Read up to the answer to SYNC; answers the device's questions, check each reply, return the ids."""
    seen = []
    while True:
        header, payload, fds = wire.receive()
        for fd in fds:
            os.close(fd)
        if header.flags == proto.TYPE_COMMAND:
            answers = [proto.reply(header.id, header.command, payload), proto.error_reply(header.id, header.command, 5)]
            wire.send(fuzzer.random.choice(answers))
            continue
        assert header.flags in (proto.TYPE_REPLY, proto.TYPE_REPLY | proto.ERROR)
        if header.flags & proto.ERROR:
            assert payload == b""
            assert header.error in errno.errorcode
        else:
            assert header.error == 0
            CHECKS[header.command](payload)
        if header.id == SYNC:
            return seen
        seen.append(header.id)


def check_device(path):
    """Everything a card can do still works."""
    with VfioUserClient.connect(path) as client:
        assert client.config.read_int(0, 4) == 0x56781234
        bar = client.region(0)
        assert bar.read(0x40, 64) == bytes(64)
        bar.write(0x40, b"intact")
        assert bar.read(0x40, 6) == b"intact"
        client.dma_map(0, 0x4000)
        (done,) = client.arm(Irq.MSI)
        bar.write(0x10, struct.pack("<QQI", 0, 0x1000, 64))
        bar.write_int(0x24, 4, 1)
        assert done.wait(5) == 1
        assert bar.read_int(8, 4) == 0


def test_ten_thousand_messages(serve, connect, make_card, files, seed, until, caplog):
    card = make_card()
    server = serve(card)
    fuzzer = Fuzzer(seed, files)
    for _ in range(0, MESSAGES, 500):
        wire = connect(server)
        for _ in range(500 // BATCH):
            wanted = []
            for ident in range(BATCH):
                message, fds = fuzzer.message(ident)
                wire.send(message, fds)
                if not proto.HEADER.unpack_from(message)[3] & proto.NO_REPLY:
                    wanted.append(ident)
            wire.send(proto.message(SYNC, Command.DEVICE_GET_INFO, proto.pack_device_info_request()))
            seen = collect(wire, fuzzer)
            # A reply to a question of the device's is the one message that is taken without a word.
            assert [ident for ident in wanted if ident in seen] == seen
            assert len(seen) >= len(wanted) - 2
        wire.close()
    until(lambda: server.client is None)
    check_device(server.path)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_streams_without_framing(serve, connect, make_card, files, seed, until):
    """Messages with a size that lies, and plain noise: the connection may end, nothing else does."""
    server = serve(make_card())
    fuzzer = Fuzzer(seed, files)
    for _ in range(300):
        wire = connect(server)
        with contextlib.suppress(ConnectionError):
            for ident in range(fuzzer.random.randrange(1, 6)):
                message, fds = fuzzer.message(ident)
                message = fuzzer.random.choice([message, fuzzer.random.randbytes(50)])
                lie = struct.pack("=I", fuzzer.random.choice([*EDGES, len(message) + 1, max(0, len(message) - 1)]))
                message = message[:4] + lie + message[8:]
                cut = fuzzer.random.randrange(len(message))
                wire.send(message[:cut], fds if cut else ())
                wire.send(message[cut:])
        wire.close()
    until(lambda: server.client is None)
    check_device(server.path)


def test_first_messages(serve, connect, make_card, seed):
    server = serve(make_card())
    fuzzer = Fuzzer(seed, [])
    good = proto.message(1, Command.VERSION, proto.Version(0, 0, proto.Capabilities(16, migration_pgsize=4096)).pack())
    for _ in range(400):
        wire = connect(server, hello=False)
        with contextlib.suppress(ConnectionError):
            wire.send(fuzzer.mutate(good))
            wire.sock.shutdown(1)
            answer = wire.receive()
            assert answer is None or answer[0].flags & proto.TYPE_MASK == proto.TYPE_REPLY
        wire.close()
    check_device(server.path)
