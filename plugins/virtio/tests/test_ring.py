"""One virtqueue, device side, as a vendor sees it: the same on both engines and in every format."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio.driverside import Segment
from mdevkit_virtio.layout import MAX_TAKE, NO_FEATURES, Desc, Fault, Feature, RingError, VringBase, check_size
from mdevkit_virtio.memory import MemoryTable, Region

PACKED = Feature.RING_PACKED


def _refusal(function, *arguments, **more):
    with pytest.raises(MdevError) as caught:
        function(*arguments, **more)
    return caught.value


def _broken(queue):
    with pytest.raises(RingError) as caught:
        queue.take()
    assert queue.broken is not None
    return caught.value


# -- buffers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_is_read_written_and_given_back(rig, features, indirect):
    if indirect and Feature.INDIRECT_DESC not in features:
        features |= Feature.INDIRECT_DESC
    ring, queue = rig.pair(features=features)
    out = [Segment(rig.place(b"one"), 3), Segment(rig.place(b"two"), 3)]
    into = [Segment(rig.place(b"...."), 4), Segment(rig.place(b"...."), 4)]
    add = ring.add_indirect if indirect else ring.add
    assert add(out, into, "token")
    (buffer,) = queue.take()
    assert (buffer.readable, buffer.writable, buffer.read(), buffer.read(2, 2)) == (6, 8, b"onetwo", b"et")
    buffer.write(b"abcdef", 1)
    queue.complete((buffer, 7))
    assert rig.look(into[0].address, 4) + rig.look(into[1].address, 4) == b".abcdef."
    assert ring.collect() == [("token", 7)]
    assert queue.take() == []


def test_rings_go_round_many_times(rig, features):
    ring, queue = rig.pair(num=8, features=features)
    at = rig.place(bytes(8))
    collected = []
    for number in range(1000):
        rig.poke(at, number.to_bytes(8, "little"))
        segments = [Segment(at, 3), Segment(at + 3, 5)][: 1 + number % 2] if number % 2 else [Segment(at, 8)]
        assert ring.add(segments, [], number)
        (buffer,) = queue.take()
        assert buffer.read() == number.to_bytes(8, "little")
        queue.complete((buffer, 0))
        collected += [done.token for done in ring.collect()]
    assert collected == list(range(1000))


def test_a_packed_ring_need_not_be_a_power_of_two(rig):
    ring, queue = rig.pair(num=5, features=PACKED)
    at = rig.place(b"x")
    for number in range(33):
        assert ring.add([Segment(at, 1)] * (1 + number % 3), [], number)
        queue.complete(*((buffer, 0) for buffer in queue.take()))
        assert [done.token for done in ring.collect()] == [number]


def test_no_more_than_asked_for_and_in_order(rig, features):
    ring, queue = rig.pair(num=2 * MAX_TAKE, features=features)
    spots = [rig.place(bytes([number])) for number in range(MAX_TAKE + 30)]
    for spot in spots:
        ring.add([Segment(spot, 1)], [], spot)
    taken = queue.take(3) + queue.take(1000) + queue.take()
    assert [len(queue.take(limit)) for limit in (0, 5)] == [0, 0]
    assert [buffer.read() for buffer in taken] == [bytes([number]) for number in range(MAX_TAKE + 30)]


def test_buffers_come_back_in_any_order_without_in_order(rig, features):
    ring, queue = rig.pair(features=features)
    for token in "abc":
        ring.add([], [Segment(rig.place(b"-"), 1)], token)
    first, second, third = queue.take()
    queue.complete((third, 1))
    queue.complete((first, 1), (second, 0))
    expected = [("c", 1), ("a", 1), ("b", 0)]
    assert ring.collect() == (sorted(expected) if Feature.IN_ORDER in features else expected)


def test_with_in_order_a_buffer_waits_for_those_before_it(rig, features):
    ring, queue = rig.pair(features=features | Feature.IN_ORDER)
    for token in "abc":
        ring.add([], [Segment(rig.place(b"-"), 1)], token)
    first, second, third = queue.take()
    queue.complete((third, 1))
    assert ring.collect() == []
    queue.complete((first, 0))
    assert ring.collect() == [("a", 0)]
    queue.complete((second, 1))
    assert ring.collect() == [("b", 1), ("c", 1)]


def test_a_batch_in_order_is_one_entry_of_a_packed_ring(rig):
    ring, queue = rig.pair(features=PACKED | Feature.IN_ORDER)
    for token in range(5):
        ring.add([Segment(rig.place(b"-"), 1)], [], token)
    before = rig.look(ring.desc + 16, 16 * 4)
    queue.complete(*((buffer, 0) for buffer in queue.take()))
    assert rig.look(ring.desc + 16, 16 * 4) == before, "only the first descriptor is written"
    assert [done.token for done in ring.collect()] == [0, 1, 2, 3, 4]


def test_empty_descriptors_are_nothing(rig, features):
    ring, queue = rig.pair(features=features)
    ring.add([Segment(1 << 60, 0), Segment(rig.place(b"ab"), 2)], [Segment(1 << 60, 0)], 0)
    (buffer,) = queue.take()
    assert (buffer.read(), buffer.writable) == (b"ab", 0)


def test_a_buffer_may_span_regions(rigs, engine):
    rig = rigs(engine)
    half = rig.memory.size // 2
    fd = rig.memory.fd
    rig.table = MemoryTable([Region(fd, 0, half), Region(fd, half, half, offset=half)])
    ring, queue = rig.pair()
    rig.poke(half - 2, b"12345")
    ring.add([Segment(half - 2, 5)], [Segment(half - 3, 6)], 0)
    (buffer,) = queue.take()
    assert buffer.read() == b"12345"
    buffer.write(b"ABCDEF")
    assert rig.look(half - 3, 6) == b"ABCDEF"
    assert [len(buffer.chain.inputs), len(buffer.chain.outputs)] == [2, 2]


def test_access_outside_a_buffer(rig):
    ring, queue = rig.pair()
    ring.add([Segment(rig.place(b"abc"), 3)], [Segment(rig.place(b"def"), 3)], 0)
    (buffer,) = queue.take()
    assert str(_refusal(buffer.read, 2, 2)) == "2 bytes at 2 are not in the 3 readable bytes of the buffer"
    assert str(_refusal(buffer.write, b"12", 2)) == "2 bytes at 2 are not in the 3 writable bytes of the buffer"
    assert _refusal(buffer.read, -1).errno == errno.EINVAL


def test_giving_back_twice_or_too_much(rig):
    ring, queue = rig.pair()
    ring.add([], [Segment(rig.place(b"abc"), 3)], 0)
    (buffer,) = queue.take()
    assert str(_refusal(queue.complete, (buffer, 4))) == "queue 0: a buffer given back twice, or with 4 bytes of 3"
    queue.complete((buffer, 3))
    assert _refusal(queue.complete, (buffer, 3)).errno == errno.EINVAL
    assert ring.collect() == [(0, 3)]


# -- life ------------------------------------------------------------------------------------------------------------------


def test_a_queue_starts_once_and_is_of_no_use_while_stopped(rig):
    ring, queue = rig.pair()
    error = _refusal(queue.start, rig.table, rig.config(ring))
    assert (error.errno, str(error)) == (errno.EBUSY, "queue 0 runs already")
    queue.stop()
    assert not queue.running
    error = _refusal(queue.take)
    assert (error.errno, str(error)) == (errno.ENOTCONN, "queue 0 is not started")
    assert queue.stop() == VringBase()


@pytest.mark.parametrize(
    ("num", "packed", "message"),
    [
        (0, False, "a ring of 0 descriptors is not possible, 32768 are the most"),
        (65536, True, "a ring of 65536 descriptors is not possible, 32768 are the most"),
        (12, False, "a split ring of 12 descriptors is not possible, the size must be a power of 2"),
    ],
)
def test_sizes_a_ring_cannot_have(num, packed, message):
    error = _refusal(check_size, num, packed=packed)
    assert (error.errno, str(error)) == (errno.EINVAL, message)


@pytest.mark.parametrize(("area", "by", "name"), [("desc", 8, "descriptor"), ("driver", 1, "driver"), ("device", 2, "device")])
def test_areas_must_be_aligned(rig, area, by, name):
    ring = rig.ring()
    setattr(ring, area, getattr(ring, area) + by)
    error = _refusal(rig.queue, ring)
    assert error.errno == errno.EINVAL
    assert str(error).startswith(f"the {name} area at 0x")


def test_stopping_and_going_on_loses_and_repeats_nothing(rig, features):
    ring, queue = rig.pair(num=8, features=features)
    at = rig.place(b"x")
    seen = []
    for number in range(100):
        assert ring.add([Segment(at, 1)], [], number)
        if number % 3 == 0:
            queue.take()  # taken and not given back: whoever goes on takes it again
            number_on_the_wire = queue.stop().encode(packed=PACKED in features)
            queue = rig.queue(ring, base=number_on_the_wire)
        buffers = queue.take()
        queue.complete(*((buffer, 0) for buffer in buffers))
        seen += [done.token for done in ring.collect()]
    assert seen == list(range(100))


def test_a_split_ring_goes_on_where_guest_memory_says(rig):
    ring, queue = rig.pair(num=4)
    for number in range(6):
        ring.add([Segment(rig.place(b"x"), 1)], [], number)
        queue.complete(*((buffer, 0) for buffer in queue.take()))
        ring.collect()
    queue = rig.queue(ring, base=0)  # as DPDK's frontend sends it after a reconnect
    ring.add([Segment(rig.place(b"y"), 1)], [], "next")
    assert [buffer.read() for buffer in queue.take()] == [b"y"]


def test_a_packed_base_that_cannot_be(rig):
    ring = rig.ring(features=PACKED)
    error = _refusal(rig.queue, ring, base=16 | 1 << 15)
    assert (error.errno, str(error)) == (errno.EINVAL, "queue 0 of 16 descriptors cannot go on at 16/16")


def test_bases_as_frontends_send_them():
    assert VringBase.decode(0x12345, packed=False) == VringBase(0x2345, 0x2345)
    assert VringBase.decode(0x8000, packed=True) == VringBase(0, 0, True, True)
    assert VringBase.decode(0x8005, packed=True) == VringBase(5, 5, True, True)
    assert VringBase.decode(0x0005_8007, packed=True) == VringBase(7, 5, True, False)
    for base in (VringBase(3, 9, False, True), VringBase(0, 0), VringBase(7, 7, True, True)):
        assert VringBase.decode(base.encode(packed=True), packed=True) == base


# -- signals and kicks -----------------------------------------------------------------------------------------------------


def _pass_one(rig, ring, queue):
    ring.add([Segment(rig.place(b"x"), 1)], [], 0)
    queue.complete(*((buffer, 0) for buffer in queue.take()))
    ring.collect()


def test_a_signal_where_it_is_wanted(rig, features):
    ring, queue = rig.pair(features=features)
    call = rig.eventfd()
    queue.set_call(call)
    ring.want_signals(True)
    _pass_one(rig, ring, queue)
    assert os.eventfd_read(call) == 1
    if Feature.EVENT_IDX in features:
        _pass_one(rig, ring, queue)  # the event index is behind: no further signal until it is moved
    else:
        ring.want_signals(False)
        _pass_one(rig, ring, queue)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(call)
    assert queue.ring.calls == 1
    ring.want_signals(True)
    _pass_one(rig, ring, queue)
    assert os.eventfd_read(call) == 1


def test_no_descriptor_for_signals_is_no_error(rig, features):
    ring, queue = rig.pair(features=features)
    ring.want_signals(True)
    _pass_one(rig, ring, queue)
    assert queue.ring.calls == 1


def test_a_full_eventfd_does_not_stop_us(rig):
    ring, queue = rig.pair()
    call = os.eventfd(0, os.EFD_CLOEXEC)  # blocking, as a hostile client would leave it
    rig.eventfds.append(call)
    os.eventfd_write(call, (1 << 64) - 2)
    queue.set_call(call)
    _pass_one(rig, ring, queue)
    assert os.eventfd_read(call) == (1 << 64) - 2


def test_kicks_are_asked_for_and_refused(rig, features):
    ring, queue = rig.pair(features=features)
    assert not queue.notify(True)
    ring.add([Segment(rig.place(b"x"), 1)], [], 0)
    assert ring.needs_kick()
    queue.take()
    queue.notify(False)
    ring.add([Segment(rig.place(b"x"), 1)], [], 0)
    assert not ring.needs_kick()
    assert queue.notify(True), "a buffer came before kicks were asked for"
    queue.take()
    assert not queue.notify(True)
    ring.add([Segment(rig.place(b"x"), 1)], [], 0)
    assert ring.needs_kick()


def test_kicks_are_drained(rig):
    _, queue = rig.pair()
    kick = rig.eventfd()
    queue.set_kick(kick)
    os.eventfd_write(kick, 3)
    queue.drain_kick()
    queue.drain_kick()
    assert queue.ring.kicks == 1


# -- what a driver can do wrong --------------------------------------------------------------------------------------------


def _split_desc(rig, ring, slot, address, length, flags, following=0):
    rig.poke(ring.desc + 16 * slot, struct.pack("<QIHH", address, length, flags, following))


def _offer(rig, ring, head, index=1):
    rig.poke(ring.driver + 4, struct.pack("<H", head))
    rig.poke(ring.driver + 2, struct.pack("<H", index))


@pytest.mark.parametrize(
    ("descriptors", "fault", "number", "sentence"),
    [
        ([(0, 1, Desc.NEXT, 0)], Fault.LOOP, errno.EINVAL, "the chain that starts at descriptor 0 is longer than the ring"),
        ([(0, 1, Desc.NEXT, 16)], Fault.HEAD, errno.EINVAL, "descriptor 16 does not exist"),
        (
            [(0, 1, Desc.WRITE | Desc.NEXT, 1), (64, 1, 0, 0)],
            Fault.ORDER,
            errno.EINVAL,
            "a chain has a readable part (0x40) behind a writable one",
        ),
        (
            [(1 << 40, 1, 0, 0)],
            Fault.ADDRESS,
            errno.EFAULT,
            "guest address 0x10000000000 is outside the memory the driver has shared",
        ),
        (
            [((1 << 64) - 32, 64, 0, 0)],
            Fault.ADDRESS,
            errno.EFAULT,
            "guest address 0xffffffffffffffe0 is outside the memory the driver has shared",
        ),
        (
            [(0, 0xFFFFFFFF, 0, 0)],
            Fault.ADDRESS,
            errno.EFAULT,
            "guest address 0x100000 is outside the memory the driver has shared",
        ),
        ([(0, 1 << 31, Desc.NEXT, 1), (0, 1 << 31, 0, 0)], Fault.ADDRESS, errno.EFAULT, "guest address 0x100000 is outside"),
        ([(0, 16, Desc.INDIRECT, 0)], Fault.INDIRECT, errno.EINVAL, "an indirect table of 16 bytes is not allowed here"),
    ],
)
def test_a_bad_chain_breaks_the_ring(rig, descriptors, fault, number, sentence):
    ring, queue = rig.pair()
    for slot, descriptor in enumerate(descriptors):
        _split_desc(rig, ring, slot, *map(int, descriptor))
    _offer(rig, ring, 0)
    error = _broken(queue)
    assert (error.fault, error.errno) == (fault, number)
    assert str(error).startswith(f"queue 0 is broken by its driver: {sentence}")
    assert _broken(queue).fault == fault, "and stays broken"


def test_a_head_that_does_not_exist(rig):
    ring, queue = rig.pair()
    _offer(rig, ring, 16)
    assert _broken(queue).fault is Fault.HEAD


@pytest.mark.parametrize("index", [17, 5000, 0xFFFF])
def test_an_index_that_jumps(rig, index):
    ring, queue = rig.pair()
    _offer(rig, ring, 0, index)
    assert str(_broken(queue)) == f"queue 0 is broken by its driver: more buffers are available than the ring has (index {index})"


def test_a_packed_ring_offered_twice_over(rig):
    ring, queue = rig.pair(num=4, features=PACKED)
    for _ in range(4):
        ring.add([Segment(rig.place(b"x"), 1)], [], 0)
    assert len(queue.take()) == 4
    for slot in range(4):  # as if the device had used them and the driver offered them again
        rig.poke(ring.desc + 16 * slot + 14, struct.pack("<H", Desc.USED))
    assert _broken(queue).fault is Fault.INDEX


def test_a_packed_chain_without_end(rig):
    ring, queue = rig.pair(num=4, features=PACKED)
    for slot in range(4):
        rig.poke(ring.desc + 16 * slot, struct.pack("<QIHH", 0, 1, slot, Desc.AVAIL | Desc.NEXT))
    assert _broken(queue).fault is Fault.LOOP


def _indirect(rig, ring, length, *entries, flags=Desc.INDIRECT):
    table = rig.place(b"".join(struct.pack("<QIHH", *map(int, entry)) for entry in entries))
    packed = PACKED in ring.features
    rest = (0, int(flags | Desc.AVAIL)) if packed else (int(flags), 0)
    rig.poke(ring.desc, struct.pack("<QIHH", table, length, *rest))
    if not packed:
        _offer(rig, ring, 0)


@pytest.mark.parametrize("packed", [NO_FEATURES, PACKED])
@pytest.mark.parametrize("length", [0, 8, 24, 16 * 17, 0xFFFFFFF0])
def test_indirect_tables_of_a_wrong_size(rig, packed, length):
    ring, queue = rig.pair(features=packed | Feature.INDIRECT_DESC)
    _indirect(rig, ring, length, (0, 1, 0, 0))
    assert _broken(queue).fault is Fault.INDIRECT


@pytest.mark.parametrize("packed", [NO_FEATURES, PACKED])
def test_indirect_with_next(rig, packed):
    ring, queue = rig.pair(features=packed | Feature.INDIRECT_DESC)
    _indirect(rig, ring, 16, (0, 1, 0, 0), flags=Desc.INDIRECT | Desc.NEXT)
    assert _broken(queue).fault is Fault.INDIRECT


def test_indirect_inside_indirect(rig):
    ring, queue = rig.pair(features=Feature.INDIRECT_DESC)
    _indirect(rig, ring, 16, (0, 16, Desc.INDIRECT, 0))
    assert _broken(queue).fault is Fault.INDIRECT


def test_an_indirect_table_that_is_the_ring_itself(rig):
    ring, queue = rig.pair(features=Feature.INDIRECT_DESC)
    _split_desc(rig, ring, 0, ring.desc, 256, int(Desc.INDIRECT))
    _offer(rig, ring, 0)
    assert _broken(queue).fault is Fault.INDIRECT


def test_a_loop_inside_an_indirect_table(rig):
    ring, queue = rig.pair(features=Feature.INDIRECT_DESC)
    _indirect(rig, ring, 32, (0, 1, Desc.NEXT, 1), (0, 1, Desc.NEXT, 0))
    assert _broken(queue).fault is Fault.LOOP


def test_an_indirect_table_outside_memory(rig, features):
    ring, queue = rig.pair(features=features | Feature.INDIRECT_DESC)
    ring.add([Segment(0, 1)], [], 0)
    flags = Desc.INDIRECT | (Desc.AVAIL if PACKED in features else 0)
    rest = (0, int(flags)) if PACKED in features else (int(flags), 0)
    rig.poke(ring.desc, struct.pack("<QIHH", rig.memory.size - 16, 32, *rest))
    (word,) = struct.unpack("<H", rig.look(ring.driver + 4, 2)) if PACKED not in features else (0,)
    rig.poke(ring.desc + 16 * word, struct.pack("<QIHH", rig.memory.size - 16, 32, *rest))
    assert _broken(queue).fault is Fault.ADDRESS


def test_an_indirect_table_may_be_as_long_as_the_ring_and_lie_anywhere(rig):
    ring, queue = rig.pair(features=Feature.INDIRECT_DESC)
    rig.memory.allocate(3, 1)
    segments = [Segment(rig.place(bytes([i])), 1) for i in range(16)]
    table = rig.memory.allocate(16 * 16 + 5) + 5
    entries = [struct.pack("<QIHH", *s, int(Desc.NEXT) if i < 15 else 0, i + 1) for i, s in enumerate(segments)]
    rig.poke(table, b"".join(entries))
    _split_desc(rig, ring, 0, table, 256, int(Desc.INDIRECT))
    _offer(rig, ring, 0)
    (buffer,) = queue.take()
    assert buffer.read() == bytes(range(16))


def test_a_chain_in_too_many_pieces(rigs, engine):
    rig = rigs(engine, 1 << 20)
    ring, queue = rig.pair(num=2048)
    for slot in range(1025):
        _split_desc(rig, ring, slot, 64, 1, int(Desc.NEXT) if slot < 1024 else 0, slot + 1)
    _offer(rig, ring, 0)
    error = _broken(queue)
    assert (error.fault, str(error)) == (
        Fault.LENGTH,
        "queue 0 is broken by its driver: a buffer has more bytes or pieces than a device takes (0x400)",
    )


def test_good_buffers_before_a_bad_one_are_served(rig, features):
    ring, queue = rig.pair(features=features)
    for address in (rig.place(b"a"), rig.place(b"b"), 1 << 40):
        ring.add([Segment(address, 1)], [], address)
    buffers = queue.take()
    assert [buffer.read() for buffer in buffers] == [b"a", b"b"]
    queue.complete(*((buffer, 0) for buffer in buffers))
    assert len(ring.collect()) == 2
    assert _broken(queue).fault is Fault.ADDRESS


def test_a_broken_ring_is_not_written_to(rig, features):
    ring, queue = rig.pair(features=features)
    ring.add([], [Segment(rig.place(b"a"), 1)], 0)
    (buffer,) = queue.take()
    ring.add([Segment(1 << 40, 1)], [], 0)
    _broken(queue)
    before = bytes(rig.memory.map)
    assert _refusal(queue.complete, (buffer, 1)).errno == errno.EFAULT
    assert _refusal(queue.notify, True).errno == errno.EFAULT
    assert bytes(rig.memory.map) == before
    base = queue.stop()
    assert base.avail == base.used == 0
