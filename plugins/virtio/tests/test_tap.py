"""TAP interfaces: what opening one is refused with, and a port that is held up on either side."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest
from mdevkit import MdevError
from mdevkit_virtio.virtio.tap import Tap, TapPort

PATIENCE = 20
NOBODY = 65534


def test_a_name_too_long():
    with pytest.raises(MdevError, match="'an-interface-too-long' has 21 bytes, an interface's name may have 15") as caught:
        Tap.open("an-interface-too-long")
    assert caught.value.errno == errno.EINVAL


def test_a_descriptor_that_is_no_tap():
    reader, writer = os.pipe()
    with pytest.raises(MdevError, match=rf"descriptor {reader} is no TAP interface") as caught:
        Tap(reader)
    assert caught.value.errno == errno.EINVAL
    os.close(reader)
    os.close(writer)


OPEN = """
import os, sys
from mdevkit_virtio.virtio.tap import Tap
os.setuid(int(sys.argv[2]))
try:
    Tap.open(sys.argv[1])
except OSError as error:
    print(error.errno, error)
"""


def opened_by(user, *prefix, name="mdkt7"):
    """Return what opening a TAP prints in another process, which becomes that user."""
    command = [*prefix, sys.executable, "-c", OPEN, name, str(user)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run it as root")
def test_without_the_right_it_is_said_how_to_get_one():
    number, _, text = opened_by(NOBODY).partition(" ")
    assert int(number) == errno.EPERM
    assert text.startswith("cannot open mdkt7: that needs CAP_NET_ADMIN. As root make one for yourself: ip tuntap add dev mdkt7 ")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace: run it as root")
def test_an_interface_of_another_kind():
    assert opened_by(0, "unshare", "-n", name="lo") == f"{errno.EINVAL} cannot open lo: it is no TAP interface, or no name for one"


@pytest.fixture
def pair(monkeypatch):
    """A TAP whose host is a pair of sockets: frames go in and out one by one, and it can be full."""
    host, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (host, inside):
        end.setblocking(False)
    monkeypatch.setattr("mdevkit_virtio.virtio.tap.fcntl.ioctl", lambda *_: b"tap9".ljust(16, b"\0") + b"\2\x10".ljust(24, b"\0"))
    tap = Tap(os.dup(inside.fileno()))
    inside.close()
    yield host, tap
    host.close()


def frame(number, size=60):
    return (b"\xff" * 12 + b"\x88\xb5" + number.to_bytes(4, "big")).ljust(size, bytes([number % 251]))


def test_nothing_is_lost_while_the_host_takes_nothing(lab, pair, wait_until):
    host, tap = pair
    netdev = lab.netdev(num=8)
    port = TapPort(netdev, tap)
    assert netdev.port.name == f"tap9 (pid {os.getpid()})"
    sent = [frame(number, 1400) for number in range(1500)]
    left, got = list(sent), []

    def push():
        try:
            while left:
                host.send(left[0])
                left.pop(0)
        except BlockingIOError:
            return True
        return not left

    wait_until(push)
    wakeups = netdev.irq.wakeups
    wait_until(push)
    assert left
    assert netdev.irq.wakeups - wakeups < 10, "nobody spins while nobody reads"

    def pull():
        push()
        try:
            got.append(host.recv(2000))
        except BlockingIOError:
            return False
        return len(got) == len(sent)

    wait_until(pull)
    assert got == sent
    assert netdev.statistics.tx_dropped == 0
    port.close()
    port.close()
    assert netdev.port is None


def test_frames_too_long_for_the_netdev_are_dropped(lab, pair, wait_until):
    host, tap = pair
    netdev = lab.netdev()
    port = TapPort(netdev, tap)
    host.send(frame(1, 3000))
    host.send(frame(2))
    wait_until(lambda: netdev.statistics.rx_packets == 1)
    assert netdev.statistics.tx_dropped == 1
    port.close()


def test_the_port_ends_with_the_netdev_and_says_so(lab, pair):
    _, tap = pair
    ended = []
    netdev = lab.netdev()
    port = TapPort(netdev, tap, on_end=lambda: ended.append(True))
    with pytest.raises(MdevError, match="netdev eth0 is in use by tap9"):
        TapPort(netdev, tap)
    lab.registry.close()
    assert ended == [True]
    with pytest.raises(OSError, match="Bad file descriptor"):
        tap.read()
    port.close()
