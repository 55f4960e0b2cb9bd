"""What a client gives a device and gets from it: interrupts, memory, migration; and what is refused."""

import errno
import os
import struct
import threading

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.ops import DmaRegion, IrqRequest, RegionInfo
from mdevkit_vfio.proto import Command
from mdevkit_vfio.uapi import Feature, IrqSet, MigrationState, RegionFlag

ACCESS = struct.Struct("=QII")


def dma_map(iova=0, size=4096, flags=3, offset=0):
    return proto.DmaMap(flags, offset, iova, size).pack()


def dma_unmap(iova=0, size=4096, flags=0):
    return proto.DmaUnmap(flags, iova, size).pack()


def set_irqs(flags, index, start, count, bools=()):
    return proto.SetIrqs(flags, index, start, count, bools).pack()


def write(region, offset, data):
    return proto.Access(offset, region, len(data)).pack() + data


# -- SET_IRQS

TRIGGER_FD = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER


def test_eventfds_reach_the_device_and_are_its_own(wire, recorder, eventfd):
    fds = [eventfd(), eventfd()]
    assert wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 5, 2), fds) == b""
    request = recorder.calls[-1][1]
    assert (request.flags, request.index, request.start, request.count) == (TRIGGER_FD, 2, 5, 2)
    for ours, theirs in zip(fds, request.fds, strict=True):
        os.eventfd_write(theirs, 3)
        assert os.eventfd_read(ours) == 3
        assert not os.get_inheritable(theirs)


def test_an_eventfd_request_without_eventfds_takes_them_away(wire, recorder, eventfd):
    wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 0, 2), [eventfd(), eventfd()])
    wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 0, 2))
    assert recorder.calls[-1][1].fds == (-1, -1)
    assert recorder.armed == {}


@pytest.mark.parametrize(
    ("payload", "request_"),
    [
        (set_irqs(0x21, 0, 0, 0), IrqRequest(IrqSet(0x21), 0, 0, 0)),
        (set_irqs(0x11, 0, 0, 1), IrqRequest(IrqSet(0x11), 0, 0, 1)),
        (set_irqs(0x09, 1, 1, 2), IrqRequest(IrqSet(0x09), 1, 1, 2)),
        (set_irqs(0x22, 1, 1, 2, (False, True)), IrqRequest(IrqSet(0x22), 1, 1, 2, (False, True))),
        (set_irqs(0x14, 0, 0, 1), IrqRequest(IrqSet(0x14), 0, 0, 1, (), (-1,))),
    ],
)
def test_set_irqs_in_all_forms(wire, recorder, payload, request_):
    assert wire.ask(Command.DEVICE_SET_IRQS, payload) == b""
    assert recorder.calls[-1] == ("set_irqs", request_)


@pytest.mark.parametrize(
    ("payload", "eventfds"),
    [
        (set_irqs(0x22, 2, 0, 1, (True,)), 1),
        (set_irqs(0x21, 2, 0, 1), 1),
        (set_irqs(TRIGGER_FD, 2, 0, 2), 1),
        (set_irqs(TRIGGER_FD, 2, 0, 1), 2),
        (set_irqs(TRIGGER_FD, 5, 0, 1), 1),
        (set_irqs(TRIGGER_FD, 2, 300, 1), 1),
        (set_irqs(TRIGGER_FD, 2, 284, 0xFFFFFFFF), 1),
        (bytes(8), 3),
    ],
)
def test_descriptors_of_a_refused_set_irqs_are_closed(wire, recorder, eventfd, payload, eventfds, open_files):
    before = set(open_files())
    fds = [eventfd() for _ in range(eventfds)]
    assert wire.refused(Command.DEVICE_SET_IRQS, payload, fds) == errno.EINVAL
    assert set(open_files()) - before == {str(fd) for fd in fds}
    assert "set_irqs" not in recorder.names()


def test_only_eventfds_are_eventfds(wire, recorder, memfd):
    reading, writing = os.pipe()
    try:
        for fd in (reading, writing, memfd(4096)):
            assert wire.refused(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 0, 1), [fd]) == errno.EINVAL
    finally:
        os.close(reading)
        os.close(writing)
    assert "set_irqs" not in recorder.names()


def test_eventfds_a_device_refuses_count_no_more(wire, recorder, eventfd):
    fd = eventfd()
    recorder.fail["set_irqs"] = MdevError(errno.EINVAL, "no")
    for _ in range(300):
        assert wire.refused(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 0, 1), [fd]) == errno.EINVAL
    recorder.fail.clear()
    wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 0, 1), [fd])


def test_one_client_has_256_descriptors_and_gets_them_back(wire, recorder, eventfd, memfd):
    fd = eventfd()
    for number in range(255):
        wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, number, 1), [fd])
    wire.ask(Command.DMA_MAP, dma_map(), [memfd(4096)])
    assert wire.refused(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 255, 1), [fd]) == errno.EMFILE
    assert wire.refused(Command.DMA_MAP, dma_map(4096), [memfd(4096)]) == errno.EMFILE
    # One that replaces another is no more.
    wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 7, 1), [fd])
    wire.ask(Command.DMA_UNMAP, dma_unmap())
    wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, 255, 1), [fd])
    wire.ask(Command.DEVICE_SET_IRQS, set_irqs(0x21, 2, 0, 0))
    for number in range(0, 256, 16):
        wire.ask(Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, number, 16), [fd] * 16)


# -- descriptors where there should be none, and too many of them


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DEVICE_GET_INFO, proto.pack_device_info_request()),
        (Command.DEVICE_GET_REGION_INFO, proto.pack_region_info_request(0)),
        (Command.DEVICE_GET_IRQ_INFO, proto.pack_irq_info_request(0)),
        (Command.REGION_READ, ACCESS.pack(0, 0, 4)),
        (Command.REGION_WRITE, write(0, 0, b"x")),
        (Command.DEVICE_RESET, b""),
        (Command.DMA_UNMAP, dma_unmap()),
        (999, b""),
    ],
)
def test_descriptors_that_nobody_asked_for_are_closed(wire, recorder, eventfd, command, payload, open_files):
    fd = eventfd()
    before = set(open_files())
    assert wire.refused(command, payload, [fd]) == errno.EINVAL
    assert set(open_files()) == before


@pytest.mark.parametrize("count", [17, 64, 253])
def test_more_descriptors_than_a_message_may_carry_are_closed(wire, eventfd, count, open_files):
    fd = eventfd()
    before = set(open_files())
    payload = set_irqs(TRIGGER_FD, 2, 0, count)
    assert wire.refused(Command.DEVICE_SET_IRQS, payload, [fd] * count) == errno.EINVAL
    assert wire.refused(Command.REGION_READ, ACCESS.pack(0, 0, 4), [fd] * count) == errno.EINVAL
    assert set(open_files()) == before


def test_descriptors_stay_with_their_message_in_a_pipeline(wire, recorder, eventfd):
    """Messages are glued as the kernel likes; each must still get its own descriptor."""
    fds = [eventfd() for _ in range(20)]
    for number, fd in enumerate(fds):
        wire.send(proto.message(number, Command.REGION_READ, ACCESS.pack(0, 0, 4)))
        wire.send(proto.message(number, Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 2, number, 1)), [fd])
        wire.send(proto.message(number, Command.DEVICE_SET_IRQS, set_irqs(TRIGGER_FD, 3, 0, 1)))
    for _ in range(60):
        assert wire.receive()[0].flags == proto.TYPE_REPLY
    for number, fd in enumerate(fds):
        os.eventfd_write(recorder.armed[2, number], number + 1)
        assert os.eventfd_read(fd) == number + 1


def test_descriptors_arrive_with_any_part_of_their_message(wire, recorder, eventfd):
    payload = set_irqs(TRIGGER_FD, 2, 0, 1)
    for at in range(1, 16 + len(payload)):
        message = proto.message(at, Command.DEVICE_SET_IRQS, payload)
        wire.send(message[:at])
        wire.send(message[at:], [eventfd()])
        assert wire.receive()[0].flags == proto.TYPE_REPLY


# -- DMA_MAP, DMA_UNMAP


def test_memory_reaches_the_device_and_is_its_own(wire, recorder, memfd):
    fd = memfd(0x10000)
    os.pwrite(fd, b"hello", 0x5000)
    assert wire.ask(Command.DMA_MAP, dma_map(0x100000, 0x8000, 3, 0x4000), [fd]) == b""
    region = recorder.maps[0x100000]
    assert region == DmaRegion(0x100000, 0x8000, True, True, region.fd, 0x4000)
    assert os.pread(region.fd, 5, 0x5000) == b"hello"
    wire.ask(Command.DMA_MAP, dma_map(0x200000, 4096, 1))
    assert recorder.maps[0x200000] == DmaRegion(0x200000, 4096, True, False)


def test_unmapping_answers_with_the_range(wire, recorder):
    wire.ask(Command.DMA_MAP, dma_map(4096, 8192))
    assert wire.refused(Command.DMA_UNMAP, dma_unmap(4096, 4096)) == errno.ENOENT
    assert wire.refused(Command.DMA_UNMAP, dma_unmap(0x10000, 4096)) == errno.ENOENT
    assert wire.ask(Command.DMA_UNMAP, dma_unmap(4096, 8192)) == dma_unmap(4096, 8192)
    assert recorder.maps == {}


def test_unmapping_all(wire, recorder, memfd):
    for number in range(10):
        wire.ask(Command.DMA_MAP, dma_map(number << 12), [memfd(4096)] if number % 2 else [])
    assert wire.ask(Command.DMA_UNMAP, dma_unmap(0, 0, proto.UNMAP_ALL)) == dma_unmap(0, 0, proto.UNMAP_ALL)
    assert recorder.maps == {}


def test_mapping_over_a_mapping_is_refused(wire, memfd, open_files):
    wire.ask(Command.DMA_MAP, dma_map())
    before = set(open_files())
    assert wire.refused(Command.DMA_MAP, dma_map(), [memfd(4096)]) == errno.EEXIST
    assert len(set(open_files()) - before) == 1


def test_one_client_has_1024_maps(wire, recorder):
    for number in range(1024):
        wire.ask(Command.DMA_MAP, dma_map(number << 12))
    assert wire.refused(Command.DMA_MAP, dma_map(1024 << 12)) == errno.ENOSPC
    wire.ask(Command.DMA_UNMAP, dma_unmap(0))
    wire.ask(Command.DMA_MAP, dma_map(1024 << 12))
    wire.ask(Command.DMA_UNMAP, dma_unmap(0, 0, proto.UNMAP_ALL))
    wire.ask(Command.DMA_MAP, dma_map())


def test_memory_has_to_be_long_enough_and_open_for_what_it_is(wire, recorder, memfd):
    fd = memfd(8192)
    assert wire.refused(Command.DMA_MAP, dma_map(0, 8192, 3, 4096), [fd]) == errno.EINVAL
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        assert wire.refused(Command.DMA_MAP, dma_map(0, 8192, 3), [reading]) == errno.EACCES
        wire.ask(Command.DMA_MAP, dma_map(0, 8192, 1), [reading])
    finally:
        os.close(reading)


def test_the_access_modes_of_the_specification_are_understood(wire, recorder, memfd):
    wire.ask(Command.DMA_MAP, dma_map(0, 4096, 7), [memfd(4096)])
    wire.ask(Command.DMA_MAP, dma_map(4096, 4096, 11), [memfd(4096)])
    assert wire.refused(Command.DMA_MAP, dma_map(8192, 4096, 7)) == errno.EINVAL


# -- DEVICE_FEATURE and migration


def feature(number, flags, data=b"", argsz=64):
    return proto.FeatureRequest(argsz, flags << 16 | number, data).pack()


GET, SET, PROBE = 1, 2, 4


def test_migration_features(wire, recorder):
    reply = wire.ask(Command.DEVICE_FEATURE, feature(Feature.MIGRATION, GET))
    assert struct.unpack("=IIQ", reply) == (16, GET << 16 | 1, 5)
    reply = wire.ask(Command.DEVICE_FEATURE, feature(Feature.MIG_DATA_SIZE, GET))
    assert struct.unpack("=IIQ", reply) == (16, GET << 16 | 9, 19)
    reply = wire.ask(Command.DEVICE_FEATURE, feature(Feature.MIG_DEVICE_STATE, GET))
    assert struct.unpack("=IIIi", reply) == (16, GET << 16 | 2, MigrationState.RUNNING, -1)
    request = feature(Feature.MIG_DEVICE_STATE, SET, struct.pack("=Ii", MigrationState.STOP_COPY, -1))
    assert wire.ask(Command.DEVICE_FEATURE, request) == request
    assert recorder.migration.state is MigrationState.STOP_COPY


def test_probing(wire):
    for number, flags in ((1, GET), (2, GET), (2, SET), (2, GET | SET), (9, GET), (1, 0), (2, 0), (9, 0)):
        request = feature(number, flags | PROBE, argsz=8)
        assert wire.ask(Command.DEVICE_FEATURE, request) == request
    for number, flags in ((1, SET), (1, GET | SET), (9, SET)):
        assert wire.refused(Command.DEVICE_FEATURE, feature(number, flags | PROBE)) == errno.EINVAL
    for number in (0, 3, 4, 5, Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT, 10, 0xFFFF):
        for flags in (PROBE, PROBE | GET, SET, GET):
            assert wire.refused(Command.DEVICE_FEATURE, feature(number, flags, bytes(64))) == errno.ENOTTY


@pytest.mark.parametrize(
    "payload",
    [
        feature(1, 0),
        feature(2, GET | SET),
        feature(1, 8 | GET),
        feature(1, SET, bytes(8)),
        feature(1, GET, argsz=15),
        feature(2, SET, bytes(7)),
        feature(2, SET, bytes(8), argsz=15),
        feature(2, SET, struct.pack("=Ii", 8, -1)),
        feature(2, SET, struct.pack("=Ii", 0xABCD, -1)),
        feature(2, SET, struct.pack("=Ii", 0, -1)),
        bytes(4),
    ],
)
def test_wrong_feature_requests_are_refused(wire, recorder, payload):
    assert wire.refused(Command.DEVICE_FEATURE, payload) == errno.EINVAL
    assert recorder.migration.state is MigrationState.RUNNING


def test_the_migration_stream(wire, recorder):
    assert wire.refused(Command.MIG_DATA_READ, proto.pack_mig_data(8)) == errno.EINVAL
    recorder.migration.state = MigrationState.STOP_COPY
    assert wire.ask(Command.MIG_DATA_READ, proto.pack_mig_data(8)) == struct.pack("=II", 16, 8) + b"state of"
    assert wire.ask(Command.MIG_DATA_READ, proto.pack_mig_data(100)) == struct.pack("=II", 19, 11) + b" the device"
    assert wire.ask(Command.MIG_DATA_READ, proto.pack_mig_data(100)) == struct.pack("=II", 8, 0)
    assert wire.refused(Command.MIG_DATA_WRITE, proto.pack_mig_data(3, b"abc")) == errno.EINVAL
    recorder.migration.state = MigrationState.RESUMING
    assert wire.ask(Command.MIG_DATA_WRITE, proto.pack_mig_data(3, b"abc")) == b""
    assert recorder.migration.incoming == b"abc"


def test_a_migration_that_returns_too_much_is_an_error(wire, recorder):
    recorder.migration.state = MigrationState.STOP_COPY
    recorder.migration.read = lambda count: bytes(count + 1)
    assert wire.refused(Command.MIG_DATA_READ, proto.pack_mig_data(8)) == errno.EIO


def test_a_device_that_cannot_migrate_says_so(wire, recorder):
    recorder.migration = None
    for payload in (feature(1, GET), feature(2, SET, bytes(8)), feature(6, PROBE)):
        assert wire.refused(Command.DEVICE_FEATURE, payload) == errno.ENOTTY
    assert wire.refused(Command.MIG_DATA_READ, proto.pack_mig_data(8)) == errno.ENOTTY
    assert wire.refused(Command.MIG_DATA_WRITE, proto.pack_mig_data(1, b"x")) == errno.ENOTTY


# -- DMA by message


@pytest.fixture
def in_background():
    """Runs a function on a thread of its own; returns a function that waits and gives its result, or raises what it raised."""
    threads = []

    def run(function, *args):
        result = []

        def target():
            try:
                result.append((function(*args), None))
            except OSError as error:
                result.append((None, error))

        thread = threading.Thread(target=target)
        thread.start()
        threads.append(thread)

        def wait():
            thread.join(10)
            value, error = result[0]
            if error is not None:
                raise error
            return value

        return wait

    yield run
    for thread in threads:
        thread.join(10)


def test_a_device_reads_guest_memory_by_message(wire, recorder, in_background):
    result = in_background(recorder.dma.dma_read, 0x7000, 5)
    header, payload, _ = wire.receive()
    assert header.flags == proto.TYPE_COMMAND
    assert (header.command, payload) == (Command.DMA_READ, struct.pack("=QQ", 0x7000, 5))
    wire.send(proto.reply(header.id, Command.DMA_READ, payload + b"hello"))
    assert result() == b"hello"


def test_a_device_writes_guest_memory_by_message(wire, recorder, in_background):
    result = in_background(recorder.dma.dma_write, 0x7000, b"hello")
    header, payload, _ = wire.receive()
    assert (header.command, payload) == (Command.DMA_WRITE, struct.pack("=QQ", 0x7000, 5) + b"hello")
    wire.send(proto.reply(header.id, Command.DMA_WRITE, payload[:16]))
    assert result() is None


def test_long_transfers_are_several_messages_and_short_answers_are_gone_on_from(wire, recorder, in_background):
    data = os.urandom(100000)
    reading = in_background(recorder.dma.dma_read, 0, len(data))
    moved = 0
    while moved < len(data):
        header, payload, _ = wire.receive()
        iova, count = struct.unpack("=QQ", payload)
        assert iova == moved
        assert count <= 1 << 15
        count = max(1, count - 1)
        wire.send(proto.reply(header.id, Command.DMA_READ, struct.pack("=QQ", iova, count) + data[iova : iova + count]))
        moved += count
    assert reading() == data


def test_dma_messages_keep_to_the_clients_transfer_size(server, connect, recorder, in_background):
    wire = connect(server, hello=False)
    wire.hello(proto.Version(0, 0, proto.Capabilities(max_data_xfer_size=4)).pack())
    result = in_background(recorder.dma.dma_write, 0, b"123456")
    for iova, part in ((0, b"1234"), (4, b"56")):
        header, payload, _ = wire.receive()
        assert payload == struct.pack("=QQ", iova, len(part)) + part
        wire.send(proto.reply(header.id, Command.DMA_WRITE, payload[:16]))
    result()


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (lambda i: proto.error_reply(i, Command.DMA_READ, errno.EACCES), errno.EACCES),
        (lambda i: proto.error_reply(i, Command.DMA_READ, 0), errno.EIO),
        (lambda i: proto.reply(i, Command.DMA_READ), errno.EINVAL),
        (lambda i: proto.reply(i, Command.DMA_READ, struct.pack("=QQ", 0, 0)), errno.EPROTO),
        (lambda i: proto.reply(i, Command.DMA_READ, struct.pack("=QQ", 1, 4) + b"1234"), errno.EPROTO),
        (lambda i: proto.reply(i, Command.DMA_READ, struct.pack("=QQ", 0, 5) + b"12345"), errno.EPROTO),
        (lambda i: proto.reply(i, Command.DMA_READ, struct.pack("=QQ", 0, 4) + b"123"), errno.EINVAL),
    ],
)
def test_an_answer_that_is_none_fails_the_transfer(wire, recorder, in_background, answer, number):
    result = in_background(recorder.dma.dma_read, 0, 4)
    wire.send(answer(wire.receive()[0].id))
    with pytest.raises(MdevError) as caught:
        result()
    assert caught.value.errno == number
    assert wire.read(0, 0, 1) == b"\0"


def test_a_reply_to_another_command_is_no_answer(wire, recorder, in_background):
    result = in_background(recorder.dma.dma_read, 0, 4)
    header, payload, _ = wire.receive()
    wire.send(proto.reply(header.id, Command.DMA_WRITE, payload))
    assert wire.receive()[0].error == errno.EINVAL
    wire.send(proto.reply(header.id, Command.DMA_READ, payload + b"1234"))
    assert result() == b"1234"


def test_a_client_that_leaves_ends_the_transfer(wire, recorder, in_background):
    result = in_background(recorder.dma.dma_read, 0, 4)
    wire.receive()
    wire.close()
    with pytest.raises(MdevError, match="the client left before it answered DMA_READ of 4 bytes at 0x0") as caught:
        result()
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(MdevError, match="the client is gone") as caught:
        recorder.dma.dma_read(0, 4)
    assert caught.value.errno == errno.ENOTCONN


def test_a_client_that_does_not_answer_times_out_and_may_answer_late(wire, recorder, in_background, monkeypatch):
    monkeypatch.setattr("mdevkit_vfio.link.DMA_TIMEOUT", 0.05)
    result = in_background(recorder.dma.dma_read, 0, 4)
    header, payload, _ = wire.receive()
    with pytest.raises(MdevError, match=r"did not answer DMA_READ of 4 bytes at 0x0 within 0.05 s") as caught:
        result()
    assert caught.value.errno == errno.ETIMEDOUT
    wire.send(proto.reply(header.id, Command.DMA_READ, payload + b"late"))
    assert wire.read(0, 0, 1) == b"\0"


@pytest.mark.parametrize("name", ["read", "write", "open", "reset"])
def test_inside_an_access_the_device_cannot_wait_for_the_client(server, connect, recorder, name):
    caught = []

    def during():
        with pytest.raises(MdevError, match="would wait for a client that waits for this access; defer it") as error:
            recorder.dma.dma_read(0, 4)
        caught.append(error.value.errno)

    recorder.during[name] = during
    wire = connect(server)
    wire.read(0, 0, 4)
    wire.ask(Command.REGION_WRITE, write(0, 0, b"x"))
    wire.ask(Command.DEVICE_RESET)
    assert caught == [errno.EDEADLK]


def test_long_replies_and_dma_messages_do_not_mix(wire, recorder, in_background):
    """A reply of a megabyte and questions of 32 KiB share the socket; each arrives in one piece."""
    recorder.regions[0] = RegionInfo(RegionFlag.READ | RegionFlag.WRITE, 1 << 20)
    results = [in_background(recorder.dma.dma_write, n << 20, bytes([n]) * 200_000) for n in range(3)]
    wire.send(b"".join(proto.message(n, Command.REGION_READ, ACCESS.pack(0, 0, 4096)) for n in range(20)))
    wire.send(b"".join(proto.message(n, Command.MIG_DATA_READ, proto.pack_mig_data(1 << 20)) for n in range(5)))
    replies = questions = 0
    while replies < 25 or questions < 21:
        header, payload, _ = wire.receive()
        if header.flags == proto.TYPE_COMMAND:
            access, data = proto.parse_dma_access(Command.DMA_WRITE, payload, with_data=True)
            assert data == bytes([access.iova >> 20]) * access.count
            wire.send(proto.reply(header.id, Command.DMA_WRITE, payload[:16]))
            questions += 1
        else:
            replies += 1
    for result in results:
        result()
