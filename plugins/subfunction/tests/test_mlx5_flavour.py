"""Flavour mlx5: the vendor's driver finds its sub-function by name and makes a network interface of it."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from mdevkit import Registry
from mdevkit_subfunction.driver import Mlx5SfDriver
from mdevkit_subfunction.parent import SubfunctionParent
from mdevkit_vdev.bus import VdevBus

SECOND = 5.0


@pytest.fixture
def registry(tmp_path):
    with Registry([VdevBus(), Mlx5SfDriver(), SubfunctionParent()], remove_timeout=0.05) as registry:
        yield registry


@pytest.fixture
def pair(registry, tmp_path):
    return [registry.create("subfunction-mlx5", endpoint_path=str(tmp_path / name)) for name in "ab"]


def netdev(mdev):
    return mdev.endpoint.netdev


def frame(receiver, sender, payload=b"payload"):
    def address(mdev):
        return bytes.fromhex(mdev.get_attribute("hw_addr").replace(":", ""))

    return address(receiver) + address(sender) + b"\x88\xb5" + payload


def connect(mdev):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SECOND)
    sock.connect(mdev.endpoint.describe()["socket"])
    return sock


def exactly(sock, size):
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk, "hung up on"
        data += chunk
    return data


def test_the_driver_binds_by_the_parents_driver_and_name(registry, pair):
    first, _ = pair
    assert (first.modalias, first.driver, first.bus) == ("vdev:subfunction.sf", "mlx5_sf", "vdev")
    facts = first.endpoint.describe()
    assert (facts["kind"], facts["name"], facts["client"]) == ("netdev", "enp6s0f0s0", "")
    assert registry.parent("0000:06:00.0").ops.eswitch.ports()[0].opstate == "attached"


def test_frames_pass_between_two_interfaces(pair):
    first, second = pair
    sent = frame(second, first)
    assert netdev(first).send(sent)
    assert netdev(second).receive(SECOND) == sent


def test_a_program_at_the_socket_is_the_interfaces_user(pair, fails):
    first, second = pair
    with connect(second) as sock:
        sent = frame(first, second)
        sock.sendall(struct.pack(">I", len(sent)) + sent)
        assert netdev(first).receive(SECOND) == sent
        assert netdev(first).send(answer := frame(second, first, bytes(1400)))
        assert exactly(sock, 4 + len(answer)) == struct.pack(">I", len(answer)) + answer
        assert "pid" in second.endpoint.describe()["client"]
        assert "go to" in fails(errno.EBUSY, netdev(second).receive, 0)


def test_a_second_program_is_hung_up_on(pair):
    with connect(pair[0]) as first, connect(pair[0]) as second:
        assert second.recv(1) == b""
        first.sendall(struct.pack(">I", 20) + bytes(20))


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", struct.pack(">I", 3) + b"abc", b"\0\0"])
def test_garbage_ends_its_connection_only(pair, garbage):
    with connect(pair[0]) as sock:
        sock.sendall(garbage)
    first, second = pair
    with connect(second) as sock:
        sent = frame(first, second)
        sock.sendall(struct.pack(">I", len(sent)) + sent)
        assert netdev(first).receive(SECOND) == sent


def test_a_full_queue_drops_and_the_representor_counts(registry, pair):
    first, second = pair
    assert [netdev(first).send(frame(second, first)) for _ in range(257)] == [True] * 256 + [False]
    assert [port.representor.tx_dropped for port in registry.parent("0000:06:00.0").ops.eswitch.ports()] == [0, 1]


def test_what_cannot_be_sent(pair, fails):
    assert fails(errno.EINVAL, netdev(pair[0]).send, b"short") == "a frame of 5 bytes has no Ethernet header"
    assert "no frame came to pf0sf0 within 0 s" in fails(errno.ETIMEDOUT, netdev(pair[0]).receive, 0)


def test_no_frame_passes_while_suspended(registry, pair, fails):
    first, second = pair
    registry.suspend("0000:06:00.0")
    assert fails(errno.ENETDOWN, netdev(first).send, frame(second, first)) == "pf0sf0 is suspended"
    registry.resume("0000:06:00.0")
    assert netdev(first).send(frame(second, first))


def test_an_interface_in_use_stays_unless_forced(registry, pair, fails):
    first = pair[0]
    with connect(first) as sock:
        sock.sendall(struct.pack(">I", 20) + bytes(20))
        while not first.endpoint.describe()["client"]:
            pass  # until the connection has been accepted
        assert "is in use by" in fails(errno.EBUSY, registry.unbind, first.uuid)
        registry.remove(first.uuid, force=True)
        assert sock.recv(1) == b""
    assert [port.sfnum for port in registry.parent("0000:06:00.0").ops.eswitch.ports()] == [1]
