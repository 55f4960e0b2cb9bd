"""Flavour mlx5: the vendor's driver finds its sub-function by name and makes a network interface of it."""

from __future__ import annotations

import errno
import resource
import socket
import struct
import threading
import time

import pytest
from mdevkit import MdevError, Registry
from mdevkit_subfunction.driver import Mlx5SfDriver
from mdevkit_subfunction.netdev import QUEUE_LENGTH
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


def wait(reached):
    """Wait for something nobody tells us of."""
    deadline = time.monotonic() + SECOND
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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
    first, second = pair
    with connect(first) as sock:
        wait(lambda: first.endpoint.describe()["client"])
        sock.sendall(garbage)
    wait(lambda: not first.endpoint.describe()["client"])
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


def test_a_suspended_interface_holds_its_program_off(registry, pair):
    """What was sent meanwhile passes afterwards, all of it and in order; the program stays connected."""
    first, second = pair
    with connect(first) as sock:
        wait(lambda: first.endpoint.describe()["client"])
        registry.suspend(first.uuid)
        sent = [frame(second, first, number.to_bytes(2, "big")) for number in range(200)]
        sock.sendall(b"".join(struct.pack(">I", len(one)) + one for one in sent))
        with pytest.raises(MdevError, match="no frame came"):
            netdev(second).receive(0.1)
        registry.resume(first.uuid)
        assert [netdev(second).receive(SECOND) for _ in sent] == sent


def test_a_program_leaves_a_suspended_interface(registry, pair):
    with connect(pair[0]):
        wait(lambda: pair[0].endpoint.describe()["client"])
        registry.suspend(pair[0].uuid)
    wait(lambda: not pair[0].endpoint.describe()["client"])


def test_a_program_that_reads_slowly_gets_every_frame(pair):
    """The socket fills up in the middle of a frame; what waits goes on as soon as there is room, with no other frame to push it."""
    first, second = pair
    with connect(second) as sock:
        wait(lambda: second.endpoint.describe()["client"])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = []
        while not netdev(second)._stream.blocked:
            if netdev(first).send(one := frame(second, first, bytes(9000) + bytes([len(sent) % 256]))):
                sent.append(one)
        for _ in range(QUEUE_LENGTH // 2):
            if netdev(first).send(one := frame(second, first, bytes(9000) + bytes([len(sent) % 256]))):
                sent.append(one)
        for one in sent:
            assert exactly(sock, 4 + len(one))[4:] == one


def test_whoever_waits_for_a_frame_is_told_that_the_interface_goes(registry, pair, fails):
    gone, texts = netdev(pair[0]), []
    waiting = threading.Thread(target=lambda: texts.append(fails(errno.ENODEV, gone.receive, SECOND)))
    waiting.start()
    registry.remove(pair[0].uuid)
    waiting.join(SECOND)
    assert texts == ["pf0sf0 has gone"]


def test_frames_are_delivered_while_the_interface_goes(registry, tmp_path):
    """Whoever delivers is another device's thread: it must not fail, nor write to a descriptor that is somebody else's by now."""
    for number in range(20):
        mdev = registry.create("subfunction-mlx5", endpoint_path=str(tmp_path / str(number)))
        target, failures, go = netdev(mdev), [], threading.Barrier(2)

        def flood(target=target, failures=failures, go=go):
            go.wait()
            try:
                while not target._closing:
                    target.deliver(bytes(60))
            except OSError as error:
                failures.append(error)

        flooding = threading.Thread(target=flood)
        flooding.start()
        go.wait()
        registry.remove(mdev.uuid)
        flooding.join(SECOND)
        assert (failures, flooding.is_alive(), target.deliver(bytes(60))) == ([], False, False)


def test_a_probe_that_fails_half_way_leaves_nothing(registry, tmp_path, no_leaks, fails):
    fails(errno.ENOENT, registry.create, "subfunction-mlx5", endpoint_path=str(tmp_path / "missing" / "a"))
    assert registry.parent("0000:06:00.0").ops.eswitch.ports() == []


def test_an_interface_survives_a_time_without_descriptors(pair, caplog):
    """Nobody can be accepted, which is tried ten times a second; the program is, as soon as there is a descriptor again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECOND)
        resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, limits[1]))
        try:
            sock.connect(pair[0].endpoint.describe()["socket"])
            time.sleep(0.25)  # in which it is tried again and again
            assert not pair[0].endpoint.describe()["client"]
            assert 1 <= caplog.text.count("nobody can connect: [Errno 24] Too many open files") <= 5
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        wait(lambda: pair[0].endpoint.describe()["client"])


def test_what_clients_are_told(pair, fails, tmp_path):
    mdev = pair[0]
    uuid, mac = str(mdev.uuid)[:8], mdev.get_attribute("hw_addr")
    words = [
        *("-netdev", f"stream,id=net-{uuid},server=off,addr.type=unix,addr.path={tmp_path / 'a'}"),
        *("-device", f"virtio-net-pci,netdev=net-{uuid},mac={mac}"),
    ]
    assert mdev.endpoint.attach("qemu") == words
    assert mdev.endpoint.attach("libvirt")[1:-1] == [f"  <qemu:arg value='{word}'/>" for word in words]
    assert fails(errno.EOPNOTSUPP, mdev.endpoint.attach, "dpdk") == "dpdk cannot use a netdev"


def test_an_interface_in_use_stays_unless_forced(registry, pair, fails):
    first = pair[0]
    with connect(first) as sock:
        sock.sendall(struct.pack(">I", 20) + bytes(20))
        wait(lambda: first.endpoint.describe()["client"])
        assert "is in use by" in fails(errno.EBUSY, registry.unbind, first.uuid)
        registry.remove(first.uuid, force=True)
        assert sock.recv(1) == b""
    assert [port.sfnum for port in registry.parent("0000:06:00.0").ops.eswitch.ports()] == [1]


def test_a_port_deleted_while_its_device_is_created_fails_the_create(registry, fails, monkeypatch):
    """Between the slot's reservation and the activation anybody may delete the port: nothing is given away twice."""
    eswitch = registry.parent("0000:06:00.0").ops.eswitch
    uuid = "5ffd5757-0000-4000-8000-000000000042"
    port = eswitch.add("mlx5", uuid, 7)
    activate = eswitch.activate

    def too_late(*words):
        eswitch.delete(port.index)
        return activate(*words)

    monkeypatch.setattr(eswitch, "activate", too_late)
    text = fails(errno.ENODEV, registry.create, "subfunction-mlx5", uuid=uuid)
    assert text.endswith("was deleted while it was created")
    assert (eswitch.ports(), eswitch.slots.free) == ([], 64)
