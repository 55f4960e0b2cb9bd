"""What each command does to a device, and what is refused, through a real socket."""

import errno
import json
import os
import struct

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.ops import DeviceInfo, IrqInfo, RegionInfo, SparseArea
from mdevkit_vfio.proto import Command
from mdevkit_vfio.uapi import Device, IrqFlag, RegionFlag

ACCESS = struct.Struct("=QII")


def dma_map(iova=0, size=4096, flags=3, offset=0):
    return proto.DmaMap(flags, offset, iova, size).pack()


def dma_unmap(iova=0, size=4096, flags=0):
    return proto.DmaUnmap(flags, iova, size).pack()


def set_irqs(flags, index, start, count, bools=()):
    return proto.SetIrqs(flags, index, start, count, bools).pack()


def write(region, offset, data):
    return proto.Access(offset, region, len(data)).pack() + data


# -- VERSION


@pytest.mark.parametrize(("proposed", "agreed"), [(0, 0), (1, 1), (2, 2), (3, 2), (0xFFFF, 2)])
def test_the_lower_minor_is_agreed(server, connect, proposed, agreed):
    version = connect(server, hello=False).hello(proto.Version(0, proposed).pack())
    assert (version.major, version.minor) == (0, agreed)


def test_a_reply_names_the_capabilities_that_were_named_and_no_others(server, connect):
    qemu = proto.Version(0, 0, proto.Capabilities(migration_pgsize=4096)).pack()
    reply = connect(server, hello=False).ask(Command.VERSION, qemu)
    assert reply[-1:] == b"\0"
    assert json.loads(reply[4:-1])["capabilities"] == {
        "max_msg_fds": 16,
        "max_data_xfer_size": 1 << 20,
        "max_dma_maps": 1024,
        "pgsizes": 4096,
        "write_multiple": True,
        "migration": {"pgsize": 4096},
    }


def test_a_client_without_json_gets_json_without_capabilities(server, connect):
    reply = connect(server, hello=False).ask(Command.VERSION, struct.pack("=HH", 0, 0))
    assert reply == struct.pack("=HH", 0, 0) + b'{"capabilities": {}}\0'


def test_rust_vmm_gets_the_three_it_knows(server, connect):
    text = b'{"capabilities": {"max_msg_fds": 1, "max_data_xfer_size": 1048576, "migration": {"pgsize": 4096}}}\0'
    reply = connect(server, hello=False).ask(Command.VERSION, struct.pack("=HH", 0, 1) + text)
    assert set(json.loads(reply[4:-1])["capabilities"]) == {"max_msg_fds", "max_data_xfer_size", "migration"}


def test_a_second_version_is_refused(wire):
    assert wire.refused(Command.VERSION, proto.Version(0, 0).pack()) == errno.EINVAL
    wire.ask(Command.DEVICE_RESET)


# -- framing


def test_pipelined_messages_are_answered_in_order(wire, recorder):
    wire.send(b"".join(proto.message(i, Command.REGION_READ, proto.Access(i, 0, 1).pack()) for i in range(500)))
    for i in range(500):
        header, payload, _ = wire.receive()
        assert header.id == i
        assert payload[16:] == bytes([i & 0xFF])


@pytest.mark.parametrize("flags", [0x2, 0xF, 0x20, 0x40, 0x80000000, 0x30])
def test_unknown_header_flags_are_refused(wire, recorder, flags):
    wire.send(proto.message(1, Command.DEVICE_RESET, flags=flags))
    if flags & proto.NO_REPLY:
        wire.send(proto.message(2, Command.DEVICE_GET_INFO))
    header, _, _ = wire.receive()
    assert (header.flags, header.error) == (0x21, errno.EINVAL)
    assert "reset" not in recorder.names()


def test_an_unsolicited_reply_is_refused(wire):
    wire.send(proto.reply(1, Command.DEVICE_SET_IRQS))
    assert wire.receive()[0] == (1, Command.DEVICE_SET_IRQS, 16, 0x21, errno.EINVAL)
    wire.send(proto.reply(1, Command.DMA_READ, proto.DmaAccess(0, 0).pack()))
    assert wire.receive()[0].error == errno.EINVAL


@pytest.mark.parametrize("command", [0, Command.DMA_READ, Command.DMA_WRITE, 14, 19, 999, 0xFFFF])
def test_commands_a_client_may_not_send_are_refused(wire, command):
    assert wire.refused(command, b"\0") == errno.EINVAL
    assert wire.refused(command) == errno.EINVAL


@pytest.mark.parametrize("size", [0, 1, 15, proto.MAX_MESSAGE_SIZE + 1, 0xFFFFFFFF])
def test_a_size_that_cannot_be_right_ends_the_connection(wire, recorder, until, size):
    wire.send(proto.HEADER.pack(9, Command.DEVICE_SET_IRQS, size, 0, 0))
    header, _, _ = wire.receive()
    assert (header.id, header.error) == (9, errno.EINVAL)
    assert wire.ended()
    until(lambda: recorder.names()[-1] == "release")


@pytest.mark.parametrize("command", set(Command) - {Command.DEVICE_RESET})
def test_no_command_but_reset_goes_without_payload(wire, command):
    assert wire.refused(command) == errno.EINVAL


def test_an_error_sent_with_a_posted_message_stays_here(wire):
    wire.send(proto.message(1, Command.REGION_WRITE, b"short", proto.NO_REPLY))
    wire.send(proto.message(2, 999, b"", proto.NO_REPLY))
    assert wire.read(0, 0, 1) == b"\0"


@pytest.mark.parametrize(("size", "step"), [(300, 1), (300, 17), (1 << 16, 9999), (1 << 20, 100_003)])
def test_a_message_may_come_in_pieces(server, connect, recorder, size, step):
    recorder.regions[0] = RegionInfo(RegionFlag.READ | RegionFlag.WRITE, 1 << 20)
    wire = connect(server)
    data = os.urandom(size)
    message = proto.message(1, Command.REGION_WRITE, write(0, 0, data))
    for at in range(0, len(message), step):
        wire.send(message[at : at + step])
    assert wire.receive()[0].flags == proto.TYPE_REPLY
    assert b"".join(call[3] for call in recorder.calls if call[0] == "write") == data
    assert wire.read(2, 0, 4) == bytes(range(4))


# -- GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO


def test_get_info(wire):
    reply = wire.ask(Command.DEVICE_GET_INFO, proto.pack_device_info_request())
    assert proto.parse_device_info(reply) == DeviceInfo(Device.RESET | Device.PCI, 10, 5)
    assert struct.unpack("=IIII", wire.ask(Command.DEVICE_GET_INFO, struct.pack("=IIII", 32, 0, 0, 0)))[0] == 16
    assert wire.refused(Command.DEVICE_GET_INFO, struct.pack("=IIII", 8, 0, 0, 0)) == errno.EINVAL
    assert wire.refused(Command.DEVICE_GET_INFO, bytes(8)) == errno.EINVAL


def region_info(wire, index, argsz):
    header, reply, fds = wire.exchange(Command.DEVICE_GET_REGION_INFO, proto.pack_region_info_request(index, argsz))
    for fd in fds:
        os.close(fd)
    assert header.flags == proto.TYPE_REPLY
    return struct.unpack_from("=IIIIQQ", reply), len(reply), len(fds)


def test_get_region_info_of_registers(wire):
    assert region_info(wire, 0, 40) == ((32, 3, 0, 0, 4096, 0), 32, 0)
    assert region_info(wire, 2, 32) == ((32, 1, 2, 0, 256, 0), 32, 0)
    assert region_info(wire, 4, 32) == ((32, 0, 4, 0, 0, 0), 32, 0)
    assert region_info(wire, 5, 32) == ((32, 7, 5, 0, 0x8000, 0), 32, 1)


def test_get_region_info_sends_the_file_with_every_reply_and_the_caps_where_they_fit(wire):
    assert region_info(wire, 1, 32) == ((80, 7, 1, 0, 0x8000, 0x8000), 32, 1)
    assert region_info(wire, 1, 80) == ((80, 15, 1, 32, 0x8000, 0x8000), 80, 1)
    assert region_info(wire, 9, 200) == ((96, 15, 9, 32, 0x8000, 0x8000), 96, 1)


def test_a_client_that_takes_no_descriptors_gets_none(server, connect):
    wire = connect(server, hello=False)
    wire.hello(proto.Version(0, 0, proto.Capabilities(max_msg_fds=0)).pack())
    assert region_info(wire, 1, 80) == ((32, 3, 1, 0, 0x8000, 0), 32, 0)
    assert wire.read(1, 0, 4) == bytes(range(4))


def test_get_region_info_refusals(wire):
    assert wire.refused(Command.DEVICE_GET_REGION_INFO, proto.pack_region_info_request(10)) == errno.EINVAL
    assert wire.refused(Command.DEVICE_GET_REGION_INFO, proto.pack_region_info_request(0xFFFFFFFF)) == errno.EINVAL
    assert wire.refused(Command.DEVICE_GET_REGION_INFO, proto.pack_region_info_request(1, 8)) == errno.EINVAL
    assert wire.refused(Command.DEVICE_GET_REGION_INFO, bytes(8)) == errno.EINVAL


def test_a_file_that_could_shrink_is_not_handed_out(wire, recorder, memfd, caplog):
    unsealed = recorder.regions[1].mapping
    recorder.regions[1] = RegionInfo(RegionFlag.READ, 4096, type(unsealed)(memfd(4096)))
    assert region_info(wire, 1, 32) == ((32, 1, 1, 0, 4096, 0), 32, 0)
    assert "not a memfd sealed against resizing" in caplog.text


def test_get_region_io_fds(wire):
    reply = wire.ask(Command.DEVICE_GET_REGION_IO_FDS, proto.pack_io_fds_request(1, 512))
    assert struct.unpack("=IIII", reply) == (16, 0, 1, 0)
    for index in (4, 10, 512):
        assert wire.refused(Command.DEVICE_GET_REGION_IO_FDS, proto.pack_io_fds_request(index, 512)) == errno.EINVAL
    for values in ((512, 1, 1, 0), (512, 0, 1, 1), (15, 0, 1, 0), ((1 << 20) + 1, 0, 1, 0)):
        assert wire.refused(Command.DEVICE_GET_REGION_IO_FDS, struct.pack("=IIII", *values)) == errno.EINVAL


def test_get_irq_info(wire):
    reply = wire.ask(Command.DEVICE_GET_IRQ_INFO, struct.pack("=IIII", 32, 0, 2, 0))
    assert proto.parse_irq_info(reply) == IrqInfo(IrqFlag.EVENTFD, 300)
    assert wire.refused(Command.DEVICE_GET_IRQ_INFO, proto.pack_irq_info_request(5)) == errno.EINVAL
    assert wire.refused(Command.DEVICE_GET_IRQ_INFO, struct.pack("=IIII", 8, 0, 2, 0)) == errno.EINVAL


@pytest.fixture
def two_indexes(recorder, monkeypatch):
    """A device that knows of no interrupts but those of its first two indexes, as Linux's mtty."""

    def irq_info(index):
        if index > 1:
            raise MdevError(errno.EINVAL, f"the device has no interrupt index {index}")
        return IrqInfo(IrqFlag.EVENTFD, 1)

    monkeypatch.setattr(recorder, "irq_info", irq_info)


def test_an_index_the_device_does_not_know_has_no_interrupts(two_indexes, wire):
    assert wire.ask(Command.DEVICE_SET_IRQS, set_irqs(0x21, 1, 0, 1)) == b""
    assert wire.refused(Command.DEVICE_GET_IRQ_INFO, proto.pack_irq_info_request(2)) == errno.EINVAL
    assert wire.refused(Command.DEVICE_SET_IRQS, set_irqs(0x21, 2, 0, 1)) == errno.EINVAL


# -- region access


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 8, 256, 512, 513, 4096])
def test_reads_reach_the_device(wire, recorder, count):
    assert wire.read(0, 0, count) == bytes(recorder.registers[:count])


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (0, 4096, 1),
        (0, 4095, 2),
        (0, 1 << 63, 4),
        ((1 << 32) - 1, 0, 4),
        (0, (1 << 64) - 1, 1),
        (10, 0, 4),
        (4, 0, 1),
        (3, 0, 4),
        (0, 0, (1 << 20) + 1),
        (0, 0, 0xFFFFFFFF),
    ],
)
def test_reads_outside_a_region_are_refused(wire, recorder, region, offset, count):
    assert wire.refused(Command.REGION_READ, ACCESS.pack(offset, region, count)) == errno.EINVAL
    assert "read" not in recorder.names()


def test_a_long_access_is_cut_where_no_register_can_be(wire, recorder):
    wire.read(0, 500, 200)
    assert recorder.calls[-3:] == [("read", 0, 500, 12), ("read", 0, 512, 128), ("read", 0, 640, 60)]
    wire.ask(Command.REGION_WRITE, write(0, 1000, bytes(200)))
    assert recorder.calls[-3:] == [("write", 0, at, bytes(size)) for at, size in ((1000, 24), (1024, 128), (1152, 48))]
    # What fits a register is never cut.
    wire.ask(Command.REGION_WRITE, write(0, 1020, bytes(8)))
    assert recorder.calls[-1] == ("write", 0, 1020, bytes(8))


def test_reading_everything_once_and_again(wire, recorder):
    """Reads are remembered, but not without end, and what was remembered is right."""
    for _ in range(2):
        for offset in range(0, 4000, 3):
            assert wire.read(0, offset, 2) == bytes(recorder.registers[offset : offset + 2])


def test_a_read_whose_header_lies_about_its_size_is_none(wire, recorder):
    wire.read(0, 0, 4)
    good = proto.message(1, Command.REGION_READ, ACCESS.pack(0, 0, 4))
    wire.send(good[:4] + struct.pack("=I", 40) + good[8:])
    wire.send(bytes(8))
    assert wire.receive()[0].error == errno.EINVAL
    assert recorder.names().count("read") == 1


def test_a_lone_write_that_is_wrong_is_refused(wire, recorder):
    good = proto.message(1, Command.REGION_WRITE, write(0, 0, b"abcd"))
    wire.send(good[:4] + struct.pack("=I", 40) + good[8:])
    wire.send(bytes(4))
    assert wire.receive()[0].error == errno.EINVAL
    wire.send(good + good)
    assert [wire.receive()[0].flags for _ in range(2)] == [proto.TYPE_REPLY] * 2
    assert recorder.calls[1:] == [("write", 0, 0, b"abcd")] * 2


def test_writes_reach_the_device_and_are_acknowledged_without_data(wire, recorder):
    reply = wire.ask(Command.REGION_WRITE, write(0, 8, b"\x01\x02\x03\x04"))
    assert reply == ACCESS.pack(8, 0, 4)
    assert recorder.calls[-1] == ("write", 0, 8, b"\x01\x02\x03\x04")


@pytest.mark.parametrize(
    "payload",
    [write(0, 4096, b"x"), write(2, 0, b"x"), write(10, 0, b"x"), write(4, 0, b"x"), ACCESS.pack(0, 0, 4) + b"abc", bytes(12)],
)
def test_wrong_writes_are_refused(wire, recorder, payload):
    assert wire.refused(Command.REGION_WRITE, payload) == errno.EINVAL
    assert "write" not in recorder.names()


def test_a_posted_write_is_done_before_the_next_command_and_not_answered(wire, recorder):
    wire.send(proto.message(1, Command.REGION_WRITE, write(0, 0, b"abcd"), proto.NO_REPLY))
    wire.read(0, 0, 1)
    assert recorder.calls[-2:] == [("write", 0, 0, b"abcd"), ("read", 0, 0, 1)]


def test_a_posted_read_is_done_and_not_answered(wire, recorder):
    wire.send(proto.message(1, Command.REGION_READ, ACCESS.pack(4, 0, 4), proto.NO_REPLY))
    wire.ask(Command.DEVICE_RESET)
    assert recorder.calls[-2:] == [("read", 0, 4, 4), ("reset",)]


def test_several_writes_in_one_message(wire, recorder):
    writes = [proto.Write(0, 0, b"a"), proto.Write(3, 8, b"12345678"), proto.Write(7, 255, b"z")]
    assert proto.parse_write_multi_reply(wire.ask(Command.REGION_WRITE_MULTI, proto.pack_write_multi(writes))) == 3
    assert recorder.calls[-3:] == [("write", *w) for w in ((0, 0, b"a"), (3, 8, b"12345678"), (7, 255, b"z"))]
    wire.send(proto.message(1, Command.REGION_WRITE_MULTI, proto.pack_write_multi(writes[:1]), proto.NO_REPLY))
    assert wire.ask(Command.REGION_WRITE_MULTI, proto.pack_write_multi([])) == bytes(8)
    assert recorder.calls[-1] == ("write", 0, 0, b"a")


def test_one_wrong_write_of_several_and_none_is_done(wire, recorder):
    writes = [proto.Write(0, 0, b"a"), proto.Write(2, 0, b"b")]
    assert wire.refused(Command.REGION_WRITE_MULTI, proto.pack_write_multi(writes)) == errno.EINVAL
    assert "write" not in recorder.names()


def test_the_smaller_transfer_size_is_the_limit(server, connect, recorder):
    wire = connect(server, hello=False)
    wire.hello(proto.Version(0, 0, proto.Capabilities(max_data_xfer_size=4)).pack())
    assert wire.read(0, 0, 4) == b"\0\1\2\3"
    assert wire.refused(Command.REGION_READ, ACCESS.pack(0, 0, 5)) == errno.EINVAL
    assert wire.refused(Command.REGION_WRITE, write(0, 0, b"12345")) == errno.EINVAL
    assert wire.refused(Command.MIG_DATA_READ, proto.pack_mig_data(5)) == errno.EINVAL


def test_reset(wire, recorder):
    assert wire.ask(Command.DEVICE_RESET) == b""
    assert recorder.calls[-1] == ("reset",)
    assert wire.refused(Command.DEVICE_RESET, b"\0") == errno.EINVAL


# -- a device that fails


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (MdevError(errno.EAGAIN, "later"), errno.EAGAIN),
        (OSError(errno.ENXIO, "no"), errno.ENXIO),
        (OSError("no number"), errno.EIO),
        (OSError(-5, "negative"), errno.EIO),
        (ValueError("a bug"), errno.EIO),
        (KeyError(), errno.EIO),
    ],
)
def test_what_a_device_raises_becomes_an_errno(wire, recorder, error, number, caplog):
    for name in ("read", "write", "reset", "dma_map", "set_irqs"):
        recorder.fail[name] = error
    assert wire.refused(Command.REGION_READ, ACCESS.pack(0, 0, 4)) == number
    assert wire.refused(Command.REGION_READ, ACCESS.pack(0, 0, 4096)) == number
    assert wire.refused(Command.REGION_WRITE, write(0, 0, b"x")) == number
    assert wire.refused(Command.DEVICE_RESET) == number
    assert wire.refused(Command.DMA_MAP, dma_map()) == number
    assert wire.refused(Command.DEVICE_SET_IRQS, set_irqs(0x21, 0, 0, 1)) == number
    # A bug is for the log, a refusal is not.
    assert bool(caplog.records) != isinstance(error, OSError)


@pytest.mark.parametrize("reads_of", [lambda data: b"", lambda data: data + b"x", lambda data: None, lambda data: "text"])
def test_a_device_that_returns_the_wrong_thing_is_an_error_and_logged(wire, recorder, reads_of, caplog):
    recorder.reads_of = reads_of
    assert wire.refused(Command.REGION_READ, ACCESS.pack(0, 0, 4)) == errno.EIO
    assert wire.refused(Command.REGION_READ, ACCESS.pack(0, 0, 600)) == errno.EIO
    assert "device0" in caplog.text


def test_a_device_may_return_any_kind_of_bytes(wire, recorder):
    recorder.reads_of = bytearray
    assert wire.read(0, 0, 4) == b"\0\1\2\3"
    assert wire.read(0, 0, 600)[:4] == b"\0\1\2\3"
    recorder.reads_of = memoryview
    assert wire.read(0, 0, 4) == b"\0\1\2\3"


def test_rust_vmm_gets_all_ones_where_others_get_an_error(server, connect, recorder):
    wire = connect(server, hello=False)
    wire.hello(proto.Version(0, 1).pack())
    assert wire.read(4, 0, 4) == b"\xff" * 4
    assert wire.read(0, 4095, 2) == b"\xff" * 2
    recorder.fail["read"] = MdevError(errno.EIO, "broken")
    assert wire.read(0, 0, 8) == b"\xff" * 8
    assert wire.read(0, 0, 2048) == b"\xff" * 2048
    recorder.fail.clear()
    recorder.reads_of = lambda data: b""
    assert wire.read(0, 0, 4) == b"\xff" * 4
    # Nothing can be made up for a request that is none.
    assert wire.refused(Command.REGION_READ, bytes(15)) == errno.EINVAL
    assert wire.refused(Command.REGION_READ, ACCESS.pack(0, 0, (1 << 20) + 1)) == errno.EINVAL
    assert wire.refused(Command.REGION_WRITE, write(4, 0, b"x")) == errno.EINVAL


# -- tracing


def test_an_observer_sees_every_command_and_its_outcome(serve, recorder, connect):
    seen = []
    server = serve(recorder, observer=seen.append)
    wire = connect(server)
    wire.read(0, 4, 4)
    wire.send(proto.message(1, Command.REGION_WRITE, write(0, 0, b"ab"), proto.NO_REPLY))
    wire.refused(Command.REGION_READ, ACCESS.pack(4096, 0, 4))
    assert [(e.command, e.posted, e.errno) for e in seen[:2]] == [(9, False, 0), (10, True, 0)]
    assert (seen[0].request, seen[0].reply) == (ACCESS.pack(4, 0, 4), ACCESS.pack(4, 0, 4) + b"\4\5\6\7")
    assert seen[1].request == write(0, 0, b"ab")
    assert 0 <= seen[0].seconds < 5
    assert seen[0].began <= seen[1].began


def test_an_observer_may_come_and_go_and_fail(server, wire, recorder, caplog, until):
    seen = []
    server.observer = seen.append
    wire.read(0, 0, 4)
    until(lambda: len(seen) == 1)
    server.observer = lambda exchange: 1 / 0
    wire.read(0, 0, 4)
    until(lambda: "the observer failed" in caplog.text)
    server.observer = None
    wire.read(0, 0, 4)
    assert server.observer is None
    assert len(seen) == 1


def test_an_observer_learns_why_something_was_refused(serve, recorder, connect, until, eventfd):
    seen = []
    wire = connect(serve(recorder, observer=seen.append))
    wire.refused(Command.DMA_MAP, dma_map(1))
    wire.refused(Command.DEVICE_RESET, b"", [eventfd()])
    until(lambda: len(seen) == 2)
    assert (seen[0].errno, seen[0].reason[:18]) == (errno.EINVAL, "DMA_MAP: the range")
    assert (seen[1].fds, seen[1].reason) == (1, "DEVICE_RESET: 1 descriptors, where there are none")


def test_areas_are_those_the_device_offers(wire):
    header, reply, fds = wire.exchange(Command.DEVICE_GET_REGION_INFO, proto.pack_region_info_request(1, 80))
    assert header.flags == proto.TYPE_REPLY
    os.close(fds[0])
    assert proto.parse_region_info(reply).areas == (SparseArea(0x1000, 0x1000), SparseArea(0x3000, 0x2000))
