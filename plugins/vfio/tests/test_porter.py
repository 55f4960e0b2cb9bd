"""The porter's patience and its own end: real processes, whose patience is short."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading

import pytest
from mdevkit.errors import MdevError
from mdevkit.sockets import listen_at
from mdevkit_vfio import proto
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.front.wire import USUAL_LIMITS
from mdevkit_vfio.pci import PciDevice, PciIds
from mdevkit_vfio.proto import Command
from mdevkit_vfio.transport import Fronts, ParkedServer

PORTER = """
import logging, signal, socket, sys
from mdevkit_vfio.front import porter
logging.basicConfig()
signal.signal(signal.SIGTERM, porter._end)
porter.Porter(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], away=0.5).serve()
"""


class Device(PciDevice):
    """Can go on in another process, and has nothing to take along."""

    def device_checkpoint(self):
        return b""


@pytest.fixture
def control(folder):
    return folder / "c"


@pytest.fixture
def porter(control):
    """A porter that waits for half a second for processes that do not come back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(control))
        listener.listen()
        command = [sys.executable, "-P", "-c", PORTER, str(listener.fileno()), str(control)]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def parked(folder, control):
    """Makes servers of this process's, which are closed in the end."""
    servers = []

    def make(name, **options):
        server = ParkedServer(Device(PciIds(1, 2), {}, name=name), folder / name, name, fronts=Fronts(control), **options)
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.close()


def register_and_die(control, path):
    """Do as a process does that registers a device and is killed."""
    registration = Fronts(control).register(path.name, path, listen_at, USUAL_LIMITS)
    registration.control.close()
    registration.close_copy()


def test_a_device_whose_process_stays_away_is_given_up_when_nobody_uses_it(folder, control, porter, until):
    register_and_die(control, folder / "gone")
    assert (folder / "gone").exists()
    until(lambda: not (folder / "gone").exists())
    # And with it the porter, which has nothing left to hold.
    _, log = porter.communicate(timeout=10)
    assert "gone: its process has not come back; its socket is closed" in log
    assert porter.returncode == 0
    assert not control.exists()


def test_a_client_keeps_its_front_until_other_devices_have_come_back_and_its_own_has_not(folder, control, porter, parked, until):
    register_and_die(control, folder / "lost")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "lost"))
        client.settimeout(1.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        parked("other")
        client.settimeout(10)
        assert client.recv(1) == b""
    until(lambda: not (folder / "lost").exists())


def test_two_processes_of_one_name_are_told_of(folder, control, porter, parked):
    parked("one")
    with pytest.raises(MdevError, match="one is served by another process"):
        parked("one")


def test_a_socket_nobody_may_make_is_told_of_and_leaves_nothing(folder, control, porter, parked):
    def refuse(path):
        raise MdevError(13, f"no permission to make files in {folder}", path)

    with pytest.raises(MdevError, match="no permission to make files"):
        parked("one", listen=refuse)
    parked("one")


def test_a_server_gets_another_porter_and_keeps_its_socket(folder, control, porter, parked):
    server = parked("one")
    inode = server.path.stat().st_ino
    porter.kill()
    porter.wait()
    with VfioUserClient.connect(server.path, timeout=10) as client:
        assert client.config.read_int(0, 2) == 1
    assert server.path.stat().st_ino == inode
    assert server.failure is None
    server.close()
    assert not server.path.exists()


@pytest.fixture
def thousand_files():
    """As many descriptors as a host of a thousand devices has: those that come next are beyond what select(2) can take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    files = [os.eventfd(0) for _ in range(1024)]
    yield
    for fd in files:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_that_gets_no_socket_from_the_next_porter_says_so_until_it_does(
    folder, control, porter, parked, until, thousand_files
):
    """A porter told to end takes the sockets away, and whoever makes them may refuse to do it without being asked by anybody."""
    allowed = threading.Event()
    allowed.set()

    def listen(path):
        if not allowed.is_set():
            raise MdevError(1, f"cannot listen at {path}: nobody asked for it", path)
        return listen_at(path)

    server = parked("one", listen=listen)
    allowed.clear()
    os.kill(porter.pid, signal.SIGTERM)
    until(lambda: server.failure is not None)
    assert "nobody asked for it" in str(server.failure)
    assert not server.path.exists()
    allowed.set()
    until(lambda: server.failure is None)
    with VfioUserClient.connect(server.path) as client:
        assert client.config.read_int(0, 2) == 1


def test_a_server_that_fails_says_so(folder, control, porter, parked, until, monkeypatch):
    server = parked("one")

    def fail(control):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(server, "_step", fail)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.path))
        client.sendall(proto.message(1, Command.VERSION, proto.Version(0, 2).pack()))
        until(lambda: not server.path.exists())
    assert str(server.failure) == "one is not served any more: ValueError: a bug of ours"
