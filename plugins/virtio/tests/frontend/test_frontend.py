"""Our vhost-user frontend against our backend: frames, features, memory, configuration, and what is said when things go wrong."""

from __future__ import annotations

import errno
import gc
import os
import random
import socket
import struct
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.ops import Status
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.frontend import FEATURES, PROTOCOL, Channel, NetPair, SharedMemory, VhostUserFrontend
from mdevkit_virtio.vhost.proto import ProtocolFeature, Request

MIB = 1 << 20
PLAIN = Feature.VERSION_1 | proto.F_PROTOCOL_FEATURES
RINGS = {
    "split": PLAIN,
    "split-event": PLAIN | Feature.EVENT_IDX | Feature.INDIRECT_DESC,
    "packed": PLAIN | Feature.RING_PACKED,
    "packed-event": PLAIN | Feature.RING_PACKED | Feature.EVENT_IDX,
    "mergeable": PLAIN | Feature.NET_MRG_RXBUF,
    "old": proto.F_PROTOCOL_FEATURES,
}


def frames_of(seed, count, most=1514):
    chance = random.Random(seed)
    return [chance.randbytes(chance.randint(14, most)) for _ in range(count)]


@pytest.fixture(params=RINGS)
def rings(request):
    return RINGS[request.param]


def test_every_frame_comes_back(loopbacks, frontends, rings):
    frontend = frontends(loopbacks().path)
    frontend.negotiate(rings)
    memory = GuestMemory(4 * MIB)
    frontend.share(memory)
    pair = frontends.pair(memory, frontend.features, num=64)
    frontend.start(*pair.queues)
    frames = frames_of(1, 500)
    assert pair.exchange(frames) == frames
    assert (pair.sent, pair.received) == (500, 500)


def test_frames_larger_than_a_buffer_come_back_where_buffers_are_mergeable(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate(RINGS["mergeable"])
    memory = GuestMemory(4 * MIB)
    frontend.share(memory)
    pair = frontends.pair(memory, frontend.features, num=64, frame=9000, room=512)
    frontend.start(*pair.queues)
    frames = frames_of(2, 200, 9000)
    assert pair.exchange(frames) == frames


def test_queue_pairs_do_not_mix(loopbacks, frontends, rings):
    frontend = frontends(loopbacks(pairs=2).path)
    frontend.negotiate(rings | 1 << 22)
    assert frontend.get_queue_num() == 2
    memory = GuestMemory(4 * MIB)
    frontend.share(memory)
    pairs = [frontends.pair(memory, frontend.features, num=64, pair=i) for i in range(2)]
    frontend.start(*pairs[0].queues, *pairs[1].queues)
    for seed in range(4):
        frames = frames_of(seed, 100)
        assert pairs[seed % 2].exchange(frames) == frames
    assert [pair.received for pair in pairs] == [200, 200]


@pytest.mark.parametrize("table", [True, False])
def test_memory_in_several_regions(loopbacks, frontends, rings, table):
    frontend = frontends(loopbacks().path)
    frontend.negotiate(rings)
    memory = GuestMemory(8 * MIB)
    frontend.share(memory, [(0, MIB), (2 * MIB, MIB), (5 * MIB, 3 * MIB)], table=table)
    starts = [2 * MIB, 5 * MIB]

    def allocate(size):
        starts.append(starts.pop(0) + (size + 15) // 16 * 16)
        return starts[-1] - (size + 15) // 16 * 16

    pair = frontends.pair(memory, frontend.features, num=64, allocate=allocate)
    frontend.start(*pair.queues)
    frames = frames_of(3, 200)
    assert pair.exchange(frames) == frames
    assert frontend.get_max_mem_slots() >= 8


def test_memory_comes_and_goes_while_frames_move(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate(PLAIN)
    memory = GuestMemory(8 * MIB)
    frontend.share(memory, [(0, 4 * MIB)])
    pair = frontends.pair(memory, frontend.features, num=64)
    frontend.start(*pair.queues)
    for seed in range(10):
        frontend.add_region(5 * MIB, MIB)
        assert pair.exchange(frames_of(seed, 20)) == frames_of(seed, 20)
        frontend.remove_region(5 * MIB)
        assert pair.exchange(frames_of(seed, 20)) == frames_of(seed, 20)
    with pytest.raises(MdevError, match="no region is shared at 0x500000") as caught:
        frontend.remove_region(5 * MIB)
    assert caught.value.errno == errno.ENOENT


def test_the_device_sleeps_and_wakes_by_kicks_alone(loopbacks, frontends, rings):
    served = loopbacks()
    frontend = frontends(served.path)
    frontend.negotiate(rings)
    memory = GuestMemory(4 * MIB)
    frontend.share(memory)
    pair = frontends.pair(memory, frontend.features, num=64)
    frontend.start(*pair.queues)
    for seed in range(5):
        # It asks for kicks when it goes to sleep.
        served.until(lambda: pair.tx.ring.kick_wanted)
        assert pair.exchange(frames_of(seed, 3)) == frames_of(seed, 3)
    # It may look again between asking and sleeping; then it needs none.
    assert pair.tx.kicks >= 1


def test_status_goes_up_and_back_to_reset(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate()
    assert frontend.get_status() == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    memory = GuestMemory(4 * MIB)
    frontend.share(memory)
    pair = frontends.pair(memory, frontend.features)
    frontend.start(*pair.queues)
    assert frontend.get_status() & Status.DRIVER_OK
    frontend.set_status(0)
    assert frontend.get_status() == 0
    assert not frontend.running


def test_a_reset_device_starts_over(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate()
    memory = GuestMemory(16 * MIB)
    frontend.share(memory)
    for seed in range(3):
        pair = frontends.pair(memory, frontend.features, num=64)
        frontend.start(*pair.queues)
        assert pair.exchange(frames_of(seed, 50)) == frames_of(seed, 50)
        frontend.reset_device()
        frontend.negotiate()


def test_configuration_space(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate()
    assert len(frontend.get_config(0, 6)) == 6
    with pytest.raises(MdevError, match="the backend refused GET_CONFIG of 200 bytes at 50") as caught:
        frontend.get_config(50, 200)
    assert caught.value.errno == errno.EREMOTEIO


def test_mtu_and_rarp_are_accepted(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate()
    frontend.set_mtu(1500)
    frontend.send_rarp(bytes.fromhex("020000000001"))
    with pytest.raises(MdevError, match=r"the backend refused NET_SET_MTU \(0x16\)"):
        frontend.set_mtu(1)


def test_the_backend_gets_a_channel_of_its_own(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate()
    channel = frontend.open_backend_channel()
    frontend.close()
    # It is closed with the connection it belongs to.
    with pytest.raises(MdevError, match="the backend has closed the connection"):
        channel.receive()
    channel.close()


@pytest.mark.parametrize("left_out", [p for p in ProtocolFeature if p in PROTOCOL], ids=lambda p: p.name)
def test_it_works_without_each_protocol_feature(loopbacks, frontends, left_out):
    frontend = frontends(loopbacks().path)
    frontend.negotiate(protocol=PROTOCOL & ~left_out)
    memory = GuestMemory(4 * MIB)
    frontend.share(memory)
    pair = frontends.pair(memory, frontend.features, num=64)
    frontend.start(*pair.queues)
    assert pair.exchange(frames_of(5, 50)) == frames_of(5, 50)
    frontend.stop()


def test_it_works_without_protocol_features(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate(FEATURES & ~proto.F_PROTOCOL_FEATURES)
    assert frontend.protocol == 0
    memory = GuestMemory(4 * MIB)
    frontend.share(memory)
    pair = frontends.pair(memory, frontend.features, num=64)
    frontend.start(*pair.queues)
    assert pair.exchange(frames_of(6, 50)) == frames_of(6, 50)


def test_a_refused_request_raises_and_the_next_works(loopbacks, frontends):
    frontend = frontends(loopbacks().path)
    frontend.negotiate()
    with pytest.raises(MdevError, match=r"the backend refused SET_VRING_NUM \(") as caught:
        frontend.tell(Request.SET_VRING_NUM, proto.VringState(0, 70000).pack())
    assert caught.value.errno == errno.EREMOTEIO
    assert frontend.get_features()


def test_no_backend_is_said(tmp_path):
    with pytest.raises(MdevError, match=r"no vhost-user backend at .*none: ") as caught:
        VhostUserFrontend(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT


@pytest.fixture
def scripted():
    """A frontend whose backend is the test."""
    ours, theirs = socket.socketpair()
    with VhostUserFrontend(Channel(ours, timeout=0.1)) as frontend, theirs:
        yield frontend, theirs


def test_a_silent_backend_is_said(scripted):
    frontend, _ = scripted
    with pytest.raises(MdevError, match=r"the backend did not answer within 0\.1 s") as caught:
        frontend.get_features()
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_deaf_backend_is_said(scripted):
    frontend, _ = scripted
    with pytest.raises(MdevError, match=r"the backend did not read within 0\.1 s") as caught:
        frontend.channel.send(bytes(10_000_000))
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_backend_that_goes_is_said(scripted):
    frontend, theirs = scripted
    theirs.close()
    with pytest.raises(MdevError, match="the backend is gone: Broken pipe") as caught:
        frontend.get_features()
    assert caught.value.errno == errno.ENOTCONN


def test_a_wrong_answer_is_said_and_its_descriptors_are_closed(scripted):
    frontend, theirs = scripted
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    fd = os.memfd_create("x")
    socket.send_fds(theirs, [proto.reply(Request.GET_STATUS, proto.pack_u64(0))], [fd, fd])
    os.close(fd)
    with pytest.raises(MdevError, match="the backend answered GET_FEATURES with GET_STATUS") as caught:
        frontend.get_features()
    assert caught.value.errno == errno.EPROTO
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("data", [proto.HEADER.pack(1, 2, 8) + bytes(8), proto.HEADER.pack(1, 5, 1 << 30)])
def test_nonsense_is_said(scripted, data):
    frontend, theirs = scripted
    theirs.send(data)
    with pytest.raises(MdevError, match="the backend sent no message of version 1: Header") as caught:
        frontend.get_features()
    assert caught.value.errno == errno.EPROTO


def test_what_cannot_be_shared_is_said(scripted):
    frontend, _ = scripted
    memory = GuestMemory(MIB)
    with pytest.raises(MdevError, match="0x100001 bytes at 0x0 are not in guest memory of 0x100000"):
        SharedMemory(memory, [(0, MIB + 1)])
    with pytest.raises(MdevError, match="guest address 0x80000 is in no region that is shared"):
        SharedMemory(memory, [(0, MIB // 2)]).user(MIB // 2)
    with pytest.raises(MdevError, match="the frontend shares no memory yet"):
        frontend.add_region(0, MIB)
    memory.close()


def test_what_a_pair_cannot_do_is_said(frontends):
    memory = GuestMemory(MIB)
    pair = frontends.pair(memory, num=16)
    with pytest.raises(MdevError, match="a frame is larger than the 1514 bytes of a transmit buffer") as caught:
        pair.send([bytes(1515)])
    assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(MdevError, match=r"20 of 20 frames did not come in 0\.1 s") as caught:
        pair.exchange([bytes(60)] * 20, timeout=0.1)
    assert caught.value.errno == errno.ETIMEDOUT
    with pytest.raises(MdevError, match=r"the device has not given 16 frames back within 0\.1 s"):
        pair.settle(0.1)
    memory.close()


def test_a_pair_without_memory_for_it_says_so():
    memory = GuestMemory(4096)
    with pytest.raises(MdevError, match="do not fit into the 4096 bytes of guest memory"):
        NetPair(memory)
    memory.close()


@pytest.mark.parametrize(
    ("number", "length", "words"),
    [
        (99, 100, "queue 0: the device gave back a buffer it did not have"),
        (0, 5000, "queue 0: the device wrote 5000 bytes into a buffer of 2048"),
    ],
)
def test_a_device_that_gives_back_nonsense_is_said(frontends, number, length, words):
    memory = GuestMemory(MIB)
    pair = frontends.pair(memory, Feature.VERSION_1, num=16)
    used = pair.rx.ring.device
    memory.map[used + 4 : used + 12] = struct.pack("<II", number, length)
    memory.map[used + 2 : used + 4] = b"\1\0"
    with pytest.raises(MdevError, match=words) as caught:
        pair.receive()
    assert caught.value.errno == errno.EPROTO
    memory.close()
