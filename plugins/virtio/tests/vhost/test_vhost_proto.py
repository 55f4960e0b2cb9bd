"""The wire format: what is packed is parsed again, and what cannot be right is refused with a sentence that says why."""

from __future__ import annotations

import array
import errno
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.framing import Inbox, PeerGoneError
from mdevkit_virtio.vhost.proto import Config, LogBase, MemRegion, Request, VringAddr, VringFd, VringState

U8, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
REGIONS = st.builds(MemRegion, U64, U64, U64, U64)


@given(U64)
def test_numbers(number):
    assert proto.parse_u64(Request.SET_FEATURES, proto.pack_u64(number)) == number


@given(st.builds(VringState, U32, U32))
def test_states(state):
    assert VringState.parse(Request.SET_VRING_NUM, state.pack()) == state


@given(st.builds(VringAddr, U32, U64, U64, U64, U32, U64))
def test_addresses(addr):
    assert VringAddr.parse(addr.pack()) == addr


@given(st.builds(VringFd, U8, st.booleans()))
def test_descriptors(asked):
    assert VringFd.parse(Request.SET_VRING_KICK, asked.pack()) == asked


@given(REGIONS)
def test_regions(region):
    assert MemRegion.parse(Request.ADD_MEM_REG, region.pack()) == region


@given(st.lists(REGIONS, max_size=8), st.integers(0, 64))
def test_tables(regions, room):
    assert proto.parse_mem_table(proto.pack_mem_table(regions) + bytes(room)) == regions


@given(st.builds(LogBase, U64, U64))
def test_log_bases(base):
    assert LogBase.parse(base.pack()) == base


@given(st.builds(Config, U32, st.binary(min_size=1, max_size=256), U32))
def test_configurations(config):
    assert Config.parse(Request.GET_CONFIG, config.pack()) == config


def test_layouts_are_those_of_the_specification():
    """Against bytes as QEMU and DPDK send them."""
    assert proto.message(Request.SET_VRING_NUM, VringState(1, 256).pack(), proto.NEED_REPLY) == bytes.fromhex(
        "08000000 09000000 08000000 01000000 00010000"
    )
    assert VringAddr(0, 0x1102DC000, 0x1102DE000, 0x1102DD000).pack() == bytes.fromhex(
        "00000000 00000000 00c02d1001000000 00e02d1001000000 00d02d1001000000 0000000000000000"
    )
    assert VringFd(3, False).pack() == bytes.fromhex("0301000000000000")
    assert MemRegion(1, 2, 3, 4).pack() == b"".join(n.to_bytes(8, "little") for n in (0, 1, 2, 3, 4))
    assert proto.reply(Request.GET_STATUS, proto.pack_u64(15))[4] == 5


@pytest.mark.parametrize(
    ("parse", "payload", "words"),
    [
        (lambda p: proto.parse_u64(Request.SET_STATUS, p), b"1234", "SET_STATUS: the payload has 4 bytes, not 8"),
        (lambda p: proto.parse_u64(99, p), b"", "request 99: the payload has 0 bytes, not 8"),
        (proto.parse_mem_table, b"1234567", "SET_MEM_TABLE: the payload has 7 bytes, 8 are needed"),
        (proto.parse_mem_table, b"\x09" + bytes(7), "SET_MEM_TABLE: 9 regions, 8 are the most"),
        (proto.parse_mem_table, b"\x02" + bytes(7 + 63), "SET_MEM_TABLE: 2 regions do not fit 71 bytes"),
        (lambda p: Config.parse(Request.SET_CONFIG, p), bytes(11), "SET_CONFIG: the payload has 11 bytes, 12 are needed"),
        (lambda p: Config.parse(Request.SET_CONFIG, p), bytes(12), "0 bytes of configuration are outside 1 to 256"),
        (lambda p: Config.parse(Request.SET_CONFIG, p), bytes(4) + b"\2" + bytes(7), "2 bytes of configuration in a payload of 12"),
    ],
)
def test_payloads_that_cannot_be_right(parse, payload, words):
    with pytest.raises(MdevError, match=words) as caught:
        parse(payload)
    assert caught.value.errno == errno.EINVAL


def test_a_queue_there_is_no_room_for():
    with pytest.raises(MdevError, match="queue 256 is beyond the 255"):
        VringFd(256, False).pack()


# -- framing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(later):
    """An inbox and the socket that feeds it."""
    ours, theirs = socket.socketpair()
    later(ours.close)
    later(theirs.close)
    inbox = Inbox(ours)
    later(inbox.close)
    return inbox, theirs


@pytest.mark.parametrize("cut", range(1, 20))
def test_messages_cut_at_any_byte(pair, cut):
    inbox, peer = pair
    data = proto.message(Request.SET_VRING_NUM, VringState(1, 2).pack())
    socket.send_fds(peer, [data[:cut]], [peer.fileno()])
    assert inbox.receive() is None
    peer.send(data[cut:])
    message = inbox.receive()
    assert (message.request, message.payload, message.complete) == (Request.SET_VRING_NUM, VringState(1, 2).pack(), True)
    (fd,) = message.fds
    os.close(fd)
    assert inbox.receive() is None


def test_descriptors_belong_to_their_message(pair):
    inbox, peer = pair
    for n in range(3):
        socket.send_fds(peer, [proto.message(n)], [peer.fileno()] * n)
    for n in range(3):
        message = inbox.receive()
        assert (message.request, len(message.fds)) == (n, n)
        for fd in message.fds:
            os.close(fd)


def test_a_message_with_too_many_descriptors_has_none(pair):
    inbox, peer = pair
    data = proto.message(1, bytes(8))
    for part in (data[:12], data[12:]):
        socket.send_fds(peer, [part], [peer.fileno()] * 5)
    message = inbox.receive()
    assert (message.fds, message.complete) == ([], False)
    peer.send(proto.message(2))
    assert inbox.receive().complete


def test_what_is_not_taken_is_closed(pair):
    inbox, peer = pair
    peer.sendmsg([proto.message(1, bytes(8))[:14]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [peer.fileno()]))])
    assert inbox.receive() is None
    inbox.close()  # the fixture that counts descriptors does the rest


@pytest.mark.parametrize("size", [0, 5, 15])
def test_the_end_of_the_stream(pair, size):
    inbox, peer = pair
    peer.send(proto.message(1, bytes(8))[:size])
    peer.close()
    with pytest.raises(PeerGoneError, match="the peer closed the connection"):
        inbox.receive()
