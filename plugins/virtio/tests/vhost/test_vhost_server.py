"""Who gets a device, who does not, and how it is taken away again; both ways of connecting."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.frontend import Channel, VhostUserFrontend
from mdevkit_virtio.vhost.proto import Request
from mdevkit_virtio.vhost.server import VhostUserServer
from mdevkit_virtio.vhost.sources import BACKOFF_FIRST, BACKOFF_MOST, MAX_SILENT, Connecting, Listening

ME = f"pid {os.getpid()} ("


@pytest.fixture
def listen(tmp_path, later):
    """Makes a frontend's listening socket."""

    def make(name="frontend.sock"):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        later(listener.close)
        listener.settimeout(10)
        listener.bind(str(tmp_path / name))
        listener.listen()
        return listener

    return make


def dial(served):
    """Connect, and say nothing."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(served.path)
    return sock


def gone(sock):
    """Whether the other end has closed."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


# -- one client at a time ----------------------------------------------------------------------------------------------


def test_the_socket_is_the_owners_alone(serve):
    served = serve()
    assert stat.S_IMODE(Path(served.path).stat().st_mode) == 0o600


def test_a_second_client_is_closed_at_once(serve, connect):
    served = serve()
    net = connect(served)
    with dial(served) as second:
        assert gone(second)
    net.check()


def test_who_the_client_is(serve, connect, until):
    served = serve()
    assert served.server.client is None
    net = connect(served)
    assert str(served.server.client).startswith(ME)
    assert served.server.client.uid == os.getuid()
    net.frontend.close()
    until(lambda: served.server.client is None)


def test_a_hundred_connections_do_not_hurt(serve, connect):
    served = serve()
    net = connect(served)
    crowd = [dial(served) for _ in range(100)]
    net.check()
    for sock in crowd:
        assert gone(sock)
        sock.close()
    net.check()


def test_a_hundred_silent_connections_keep_nobody_out(serve, connect, later):
    served = serve()
    crowd = [dial(served) for _ in range(100)]
    for sock in crowd:
        later(sock.close)
    connect(served).check()
    assert all(gone(sock) for sock in crowd)


def test_silent_connections_are_few(serve, later):
    served = serve()
    crowd = [dial(served) for _ in range(MAX_SILENT + 1)]
    for sock in crowd:
        later(sock.close)
    assert gone(crowd[0])


def test_one_client_after_the_other(serve, connect):
    served = serve()
    for _ in range(20):
        net = connect(served)
        net.check(5)
        # The next one comes before this one's end has been seen.
        net.frontend.close()


# -- letting go --------------------------------------------------------------------------------------------------------


def test_a_device_nobody_uses_is_let_go_at_once(serve, later):
    served = serve()
    served.server.let_go(0)
    sock = dial(served)
    later(sock.close)
    assert gone(sock)


def test_a_client_that_stays_is_named_and_stays(serve, connect):
    served = serve()
    net = connect(served)
    with pytest.raises(MdevError, match=rf"loop is in use by pid {os.getpid()} \(") as caught:
        served.server.let_go(0.05)
    assert caught.value.errno == errno.EBUSY
    net.check()


def test_a_client_may_go_in_time(serve, connect):
    served = serve()
    net = connect(served)
    leaver = threading.Timer(0.05, net.frontend.close)
    leaver.start()
    served.server.let_go(10)
    leaver.join()
    assert served.server.client is None


def test_a_client_is_forced_off(serve, connect):
    served = serve()
    net = connect(served)
    served.server.let_go(0.01, force=True)
    assert served.server.client is None
    assert served.ops.get_status() == 0
    assert net.frontend.channel.closed_by_backend()


def test_a_client_is_served_after_a_refusal_to_let_go(serve, connect, until):
    served = serve()
    net = connect(served)
    with pytest.raises(MdevError):
        served.server.let_go(0)
    net.frontend.close()
    until(lambda: served.server.client is None)
    connect(served).check()


def test_close_cuts_a_client_off_and_removes_the_socket(serve, connect):
    served = serve()
    net = connect(served)
    served.server.close()
    assert not Path(served.path).exists()
    assert net.frontend.channel.closed_by_backend()
    served.server.close()
    served.server.suspend()  # nothing is there any more that could be


def test_a_server_starts_once(serve):
    served = serve()
    with pytest.raises(MdevError, match=r"loop has been served at .* already") as caught:
        served.server.start()
    assert caught.value.errno == errno.EALREADY


def test_a_server_must_know_its_device(loopback, tmp_path):
    ops = loopback()
    server = VhostUserServer(ops, Listening(str(tmp_path / "x")), "loop")
    with pytest.raises(MdevError, match="loop has not been examined"):
        server.start()
    server.close()
    ops.close()


@pytest.mark.parametrize(("device", "words"), [({"pairs": 0}, "x has no queue pair")])
def test_devices_that_are_not_served(loopback, tmp_path, device, words):
    ops = loopback(**device)
    with pytest.raises(MdevError, match=words) as caught:
        VhostUserServer(ops, Listening(str(tmp_path / "x")), "x").examine()
    assert caught.value.errno == errno.ENODEV
    ops.close()


def test_other_devices_than_network_cards_are_not_served(loopback, tmp_path):
    class Block(loopback):
        """A disk."""

        device_id = 2

    ops = Block()
    with pytest.raises(MdevError, match=r"x is virtio device 2; vhost_mdev serves network devices \(1\)") as caught:
        VhostUserServer(ops, Listening(str(tmp_path / "x")), "x").examine()
    assert caught.value.errno == errno.ENOTSUP
    ops.close()


def test_a_device_stuck_in_its_own_code_is_reported(serve, client, loopback, later, monkeypatch):
    monkeypatch.setattr("mdevkit_virtio.vhost.server.END_TIMEOUT", 0.3)
    entered, release = threading.Event(), threading.Event()

    class Stuck(loopback):
        """Does not return from one op until it is told to."""

        def set_features(self, features):
            entered.set()
            release.wait(10)
            super().set_features(features)

    served = serve(Stuck())
    later(release.set)
    frontend = client(served)
    frontend.channel.send(proto.message(Request.SET_FEATURES, proto.pack_u64(0)))
    assert entered.wait(10)
    for call in (served.server.suspend, served.server.close):
        with pytest.raises(MdevError, match="loop does not come back from its own code") as caught:
            call()
        assert caught.value.errno == errno.ETIMEDOUT
    release.set()


def test_a_device_that_fails_costs_its_client_one_message(serve, client, loopback, caplog):
    class Faulty(loopback):
        """Has a bug."""

        def set_features(self, features):
            raise ZeroDivisionError(f"{features} by nothing")

    served = serve(Faulty())
    frontend = client(served)
    with pytest.raises(MdevError, match="refused SET_FEATURES"):
        frontend.negotiate()
    assert "the device cannot carry out SET_FEATURES: ZeroDivisionError" in served.refusals()[-1]
    assert "ZeroDivisionError" in caplog.text
    assert frontend.get_features()


# -- connections that say nothing, or nothing any more -------------------------------------------------------------------


@pytest.fixture
def listening(runtime_folder):
    source = Listening(str(runtime_folder / "x"))
    source.open()
    yield source
    source.close()


@pytest.mark.parametrize(("gone", "taken"), [(True, True), (False, False)], ids=["gone", "there"])
def test_a_client_that_is_gone_keeps_nobody_out(listening, gone, taken):
    """It has spoken, so it gets its turn; whoever came meanwhile, perhaps the same program, gets the next one."""
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(listening.path)
        assert listening.take(listening.watched(busy=False), refusing=False) is None
        first.send(b"1")
        if gone:
            first.close()
        second.connect(listening.path)
        second.send(b"2")
        with listening.take(listening.watched(busy=False), refusing=False) as sock:
            assert sock.recv(8) == b"1"
        sock = listening.take((), refusing=False)
        assert (sock is not None) == taken
        if sock is not None:
            with sock:
                assert sock.recv(8) == b"2"


# -- paths -------------------------------------------------------------------------------------------------------------


def start(loopback, source):
    ops = loopback()
    server = VhostUserServer(ops, source, "loop")
    try:
        server.examine()
        server.start()
        server.close()
    finally:
        ops.close()


@pytest.mark.parametrize("kind", [Listening, Connecting])
def test_paths_that_are_too_long(loopback, kind):
    with pytest.raises(MdevError, match="a socket's path may have 107") as caught:
        start(loopback, kind("/" + "x" * 108))
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_path_in_no_folder(loopback, tmp_path):
    with pytest.raises(MdevError, match="does not exist") as caught:
        start(loopback, Listening(str(tmp_path / "no" / "x")))
    assert caught.value.errno == errno.ENOENT


def test_a_path_that_is_taken(loopback, serve):
    with pytest.raises(MdevError, match="is taken") as caught:
        start(loopback, Listening(serve().path))
    assert caught.value.errno == errno.EADDRINUSE


# -- the frontend serves the socket ------------------------------------------------------------------------------------


def accept(listener):
    sock, _ = listener.accept()
    return Channel(sock)


def test_the_backend_connects_and_comes_back(serve, connect, listen):
    listener = listen()
    served = serve(source=Connecting(listener.getsockname()))
    for _ in range(3):
        net = connect(accept(listener))
        net.check(20)
        assert str(served.server.client).startswith(ME)
        net.frontend.close()


def test_the_backend_waits_for_the_socket(serve, connect, listen, tmp_path):
    serve(source=Connecting(str(tmp_path / "later.sock")))
    time.sleep(2 * BACKOFF_FIRST)  # for a few attempts that fail
    connect(accept(listen("later.sock"))).check(20)


def test_the_backend_does_not_storm_a_frontend_that_closes(serve, listen):
    listener = listen()
    serve(source=Connecting(listener.getsockname()))
    began = time.monotonic()
    for _ in range(6):
        listener.accept()[0].close()
    # 50, 100, 200, 400, 800 ms between them.
    assert time.monotonic() - began > BACKOFF_FIRST * (2**4 - 1)


def test_the_backend_does_not_come_back_to_leave(serve, listen):
    listener = listen()
    served = serve(source=Connecting(listener.getsockname()))
    with VhostUserFrontend(accept(listener)):
        served.server.let_go(0, force=True)
        listener.settimeout(2 * BACKOFF_MOST)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_shortage_of_descriptors_does_not_end_the_connecting(serve, connect, listen, until, caplog, exhausted):
    caplog.set_level("DEBUG", "mdevkit.virtio")
    served = serve(source=Connecting(str(listen("not-yet.sock").getsockname()) + "-elsewhere"))
    until(lambda: "cannot connect" in caplog.text)
    with exhausted():
        caplog.clear()
        until(lambda: "cannot connect" in caplog.text)
    connect(accept(listen("not-yet.sock-elsewhere"))).check(20)
    assert served.server.client


def test_a_device_that_does_not_let_go_of_a_kick_keeps_no_other_descriptor(serve, connect, loopback, until):
    class Clinging(loopback):
        """Fails where a queue's kick is taken from it."""

        def set_vq_kick(self, index, fd):
            if fd < 0:
                raise ZeroDivisionError(index)
            return super().set_vq_kick(index, fd)

    served = serve(Clinging())
    net = connect(served)
    net.check(20)
    net.frontend.close()
    until(lambda: served.server.client is None)
