"""A server's life: its socket, its clients one after the other, and its end."""

import contextlib
import errno
import os
import resource
import socket
import stat
import struct
import threading
import time
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.proto import Command
from mdevkit_vfio.reception import Reception
from mdevkit_vfio.server import VfioUserServer
from mdevkit_vfio.uapi import IrqSet

VERSION = proto.message(7, Command.VERSION, proto.Version(0, 0).pack())


def refusal(wire):
    """The errno with which a connection's VERSION is refused; the connection must end then."""
    wire.send(VERSION)
    header, payload, _ = wire.receive()
    assert (header.id, header.command, header.flags, payload) == (7, Command.VERSION, 0x21, b"")
    assert wire.ended()
    return header.error


# -- the socket


def test_only_the_owner_may_connect(server):
    status = server.path.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600


def cannot_start(recorder, path, number, text):
    server = VfioUserServer(recorder, path, "card")
    with pytest.raises(MdevError, match=text) as caught:
        server.start()
    assert caught.value.errno == number
    server.close()


def test_a_path_too_long_is_refused(recorder, folder, no_leaks):
    path = folder / ("x" * (108 - len(str(folder)) - 1))
    cannot_start(recorder, path, errno.ENAMETOOLONG, "has 108 bytes, a socket's path may have 107")
    assert list(folder.iterdir()) == []


def test_the_longest_path_is_taken(recorder, folder, no_leaks):
    path = folder / ("x" * (107 - len(str(folder)) - 1))
    server = VfioUserServer(recorder, path, "card")
    server.start()
    assert path.exists()
    server.close()


def test_a_path_is_measured_in_bytes(recorder, folder):
    cannot_start(recorder, folder / ("ü" * 50), errno.ENAMETOOLONG, "a socket's path may have 107")


def test_a_missing_folder_is_refused(recorder, folder, no_leaks):
    cannot_start(recorder, folder / "no" / "socket", errno.ENOENT, f"the folder {folder}/no does not exist")


def test_a_folder_that_is_a_file_is_refused(recorder, folder, no_leaks):
    (folder / "file").touch()
    cannot_start(recorder, folder / "file" / "socket", errno.ENOTDIR, "file is not a folder")


def test_the_socket_is_made_by_whom_the_server_was_given(serve, recorder, connect, folder):
    """It gets the path, and what it makes need not be set up."""
    asked = []

    def listen(path):
        asked.append(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        return listener

    server = serve(recorder, "made", listen=listen)
    assert asked == [str(folder / "made")]
    assert connect(server).read(0, 0, 1) == b"\0"


def test_what_the_maker_of_the_socket_raises_is_told_and_leaves_nothing(recorder, folder, no_leaks):
    def listen(path):
        raise MdevError(errno.EACCES, f"no permission to make files in {folder}", path)

    server = VfioUserServer(recorder, folder / "socket", "card", listen=listen)
    with pytest.raises(MdevError, match=f"no permission to make files in {folder}") as caught:
        server.start()
    assert caught.value.errno == errno.EACCES
    server.close()


def test_a_path_where_another_server_listens_is_refused(server, recorder, connect, make_recorder):
    cannot_start(make_recorder(), server.path, errno.EADDRINUSE, f"{server.path} is taken: another server listens there")
    assert connect(server).read(0, 0, 1) == b"\0"


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: os.mkfifo(path)])
def test_a_path_that_is_no_socket_is_refused_and_left_alone(recorder, folder, make, no_leaks):
    path = folder / "socket"
    make(path)
    before = path.lstat()
    cannot_start(recorder, path, errno.EADDRINUSE, "is taken: something that is no socket is there")
    assert path.lstat().st_ino == before.st_ino


def test_the_socket_of_a_dead_server_is_replaced(recorder, folder, serve, connect):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "device0"))
    assert connect(serve(recorder)).read(0, 0, 1) == b"\0"


def test_the_socket_of_a_server_about_to_listen_is_left_alone(recorder, folder, no_leaks):
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as late:
        late.bind(str(path))
        timer = threading.Timer(0.01, late.listen)
        timer.start()
        cannot_start(recorder, path, errno.EADDRINUSE, "is taken: another server listens there")
        timer.join()
    assert path.exists()


def test_of_several_servers_that_want_a_dead_socket_one_gets_it(make_recorder, folder, no_leaks, connect):
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    servers = [VfioUserServer(make_recorder(), path, f"card{n}") for n in range(8)]
    failures = []

    def start(server):
        try:
            server.start()
        except MdevError as error:
            failures.append(error.errno)

    threads = [threading.Thread(target=start, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [errno.EADDRINUSE] * 7
    assert connect(servers[0]).read(0, 0, 1) == b"\0"
    for server in servers:
        server.close()
    assert not path.exists()


def test_a_server_is_started_once(server):
    with pytest.raises(MdevError, match="device0 has been served at") as caught:
        server.start()
    assert caught.value.errno == errno.EALREADY


def test_closing_leaves_a_socket_alone_that_is_somebody_elses_by_now(serve, recorder, make_recorder, connect):
    first = serve(recorder, "same")
    first.path.unlink()
    second = serve(make_recorder(), "same")
    first.close()
    assert connect(second).read(0, 0, 1) == b"\0"


def test_closing_twice_or_before_the_start_is_harmless(recorder, folder, no_leaks):
    server = VfioUserServer(recorder, folder / "socket", "card")
    server.close()
    server = VfioUserServer(recorder, folder / "socket", "card")
    server.start()
    server.close()
    server.close()


# -- clients


def test_the_client_is_known(server, wire):
    client = server.client
    assert (client.pid, client.uid, client.name) == (os.getpid(), os.getuid(), Path("/proc/self/comm").read_text().strip())
    assert str(os.getpid()) in str(client)


def test_without_a_client_there_is_none(server, connect, until, recorder):
    assert server.client is None
    wire = connect(server)
    wire.close()
    until(lambda: server.client is None)
    assert recorder.names() == ["open", "release"]


def test_a_second_client_is_refused_at_once_and_the_first_goes_on(server, wire, connect):
    began = time.monotonic()
    assert refusal(connect(server, hello=False)) == errno.EBUSY
    assert time.monotonic() - began < 1
    assert wire.read(0, 0, 1) == b"\0"


def test_the_next_client_is_served_as_soon_as_the_first_has_gone(server, connect, recorder):
    for _ in range(50):
        wire = connect(server)
        assert wire.read(0, 0, 1) == b"\0"
        wire.close()
    connect(server)
    assert recorder.names().count("open") == 51
    assert recorder.names().count("release") == 50


def test_the_next_client_waits_for_the_device_to_be_released(server, wire, connect, recorder):
    released = threading.Event()
    recorder.during["release"] = lambda: released.wait(5)
    wire.close()
    second = connect(server, hello=False)
    second.send(VERSION)
    second.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        second.receive()
    released.set()
    second.sock.settimeout(5)
    assert second.receive()[0].flags == proto.TYPE_REPLY


@pytest.mark.parametrize("size", range(16 + 36))
def test_a_client_may_vanish_at_any_byte(server, connect, recorder, until, size):
    """The device is released and the next client served, wherever the first one stops; the message itself is not done."""
    message = proto.message(1, Command.REGION_WRITE, proto.Access(0, 0, 20).pack() + bytes(20))
    assert len(message) == 16 + 36
    wire = connect(server)
    wire.send(message[:size])
    wire.close()
    assert connect(server).read(0, 0, 1) == b"\0"
    assert recorder.names()[:4] == ["open", "release", "open", "read"]


def test_a_client_may_vanish_at_any_byte_of_its_first_message(server, connect, recorder):
    for size in range(len(VERSION)):
        wire = connect(server, hello=False)
        wire.send(VERSION[:size])
        wire.close()
    connect(server)
    assert recorder.names() == ["open"]


def test_a_client_may_vanish_without_reading_its_replies(server, connect, until, recorder):
    wire = connect(server)
    wire.send(b"".join(proto.message(n, Command.REGION_READ, proto.Access(0, 0, 4096).pack()) for n in range(200)))
    until(lambda: recorder.names().count("read") > 8)
    wire.close()
    assert connect(server).read(0, 0, 1) == b"\0"


def test_somebody_who_says_nothing_keeps_nobody_away(server, connect):
    silent = [connect(server, hello=False) for _ in range(10)]
    half = connect(server, hello=False)
    half.send(VERSION[:20])
    assert connect(server).read(0, 0, 1) == b"\0"
    for wire in silent:
        assert refusal(wire) == errno.EBUSY
    half.send(VERSION[20:])
    assert half.receive()[0].error == errno.EBUSY


def test_somebody_who_says_nothing_is_sent_away(serve, recorder, connect, monkeypatch):
    monkeypatch.setattr("mdevkit_vfio.reception.PATIENCE", 0.05)
    server = serve(recorder)
    silent, half = connect(server, hello=False), connect(server, hello=False)
    half.send(VERSION[:20])
    assert silent.ended()
    assert half.receive()[0].error == errno.ETIMEDOUT


def test_of_many_who_say_nothing_the_oldest_is_sent_away(server, connect):
    silent = [connect(server, hello=False) for _ in range(40)]
    for wire in silent[:7]:
        assert wire.ended()
    assert connect(server).read(0, 0, 1) == b"\0"


def test_a_hundred_connections_at_once(server, connect, recorder):
    wires = [connect(server, hello=False) for _ in range(100)]
    for wire in wires[60:]:
        wire.send(VERSION)
    answers = [wire.receive()[0].error for wire in wires[60:]]
    assert answers.count(0) == 1
    assert set(answers) == {0, errno.EBUSY}
    assert recorder.names() == ["open"]


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (proto.message(7, Command.DEVICE_GET_INFO, bytes(16)), errno.EINVAL),
        (proto.message(7, 999, b"\0\0\0\0"), errno.EINVAL),
        (proto.message(7, Command.VERSION), errno.EINVAL),
        (proto.message(7, Command.VERSION, b"\0\0"), errno.EINVAL),
        (proto.message(7, Command.VERSION, struct.pack("=HH", 1, 0)), errno.EINVAL),
        (proto.message(7, Command.VERSION, struct.pack("=HH", 999, 0)), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4) + b"{}"), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4) + b"{\0"), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4) + b'"\0'), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4) + b'{"capabilities": "23"}\0'), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4) + b'{"capabilities": {"max_msg_fds": "foo"}}\0'), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4) + b'{"capabilities": {"migration": {"pgsize": 4095}}}\0'), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4) + b"[" * 8000 + b"\0"), errno.EINVAL),
        (proto.message(7, Command.VERSION, bytes(4), proto.NO_REPLY), errno.EINVAL),
        (proto.reply(7, Command.VERSION, bytes(4)), errno.EINVAL),
        (proto.HEADER.pack(7, Command.VERSION, 15, 0, 0), errno.EINVAL),
        (proto.HEADER.pack(7, Command.VERSION, (1 << 14) + 1, 0, 0), errno.EINVAL),
        (proto.HEADER.pack(7, Command.VERSION, 0xFFFFFFFF, 0, 0), errno.EINVAL),
    ],
)
def test_a_first_message_that_is_no_good_version_never_reaches_the_device(server, connect, recorder, message, number):
    wire = connect(server, hello=False)
    wire.send(message)
    header, payload, _ = wire.receive()
    assert (header.id, header.flags, header.error, payload) == (7, 0x21, number, b"")
    assert wire.ended()
    assert recorder.calls == []
    connect(server)


def test_a_version_with_descriptors_is_refused_and_they_are_closed(server, connect, eventfd, open_files):
    wire = connect(server, hello=False)
    fd = eventfd()
    before = open_files()
    wire.send(VERSION, [fd])
    assert wire.receive()[0].error == errno.EINVAL
    assert wire.ended()
    assert set(open_files()) <= set(before)


def test_what_follows_a_version_at_once_is_served_with_its_descriptors(server, connect, recorder, eventfd):
    wire = connect(server, hello=False)
    wire.send(VERSION)
    request = proto.SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 0, 0, 1).pack()
    wire.send(proto.message(8, Command.DEVICE_SET_IRQS, request), [eventfd()])
    assert wire.receive()[0].flags == proto.TYPE_REPLY
    assert wire.receive()[0].flags == proto.TYPE_REPLY
    assert (0, 0) in recorder.armed


def test_a_version_may_come_in_pieces(server, connect):
    wire = connect(server, hello=False)
    for byte in VERSION:
        wire.send(bytes([byte]))
    assert wire.receive()[0].flags == proto.TYPE_REPLY


@pytest.mark.parametrize(("name", "calls"), [("open", ["open"]), ("info", ["open", "release"])])
def test_a_device_may_refuse_its_client(server, connect, recorder, name, calls, until, monkeypatch):
    def refuse():
        raise MdevError(errno.EAGAIN, "not today")

    recorder.during["open" if name == "open" else ""] = refuse
    if name == "info":
        monkeypatch.setattr(recorder, "info", refuse)
    assert refusal(connect(server, hello=False)) == errno.EAGAIN
    until(lambda: recorder.names() == calls)
    until(lambda: server.client is None)


def test_a_device_that_fails_to_release_is_logged_and_serves_the_next(server, connect, recorder, caplog):
    recorder.fail["release"] = RuntimeError("a bug")
    connect(server).close()
    assert connect(server).read(0, 0, 1) == b"\0"
    assert "device0: the device failed to release" in caplog.text
    recorder.fail.clear()


# -- letting go


def test_a_device_without_client_is_let_go_and_takes_no_other(server, connect):
    server.let_go(5)
    assert refusal(connect(server, hello=False)) == errno.ENODEV


def test_a_client_that_goes_when_asked_is_let_go(server, wire, recorder):
    recorder.during["request"] = wire.close
    began = time.monotonic()
    server.let_go(5)
    assert time.monotonic() - began < 3
    assert server.client is None
    assert recorder.names()[-2:] == ["request", "release"]


def test_a_client_that_stays_is_named_and_goes_on(server, wire, recorder, connect):
    with pytest.raises(MdevError, match=rf"device0 is in use by pid {os.getpid()} \(") as caught:
        server.let_go(0.05)
    assert caught.value.errno == errno.EBUSY
    assert ("request", 0) in recorder.calls
    assert wire.read(0, 0, 1) == b"\0"
    assert refusal(connect(server, hello=False)) == errno.EBUSY
    wire.close()
    connect(server)


def test_a_client_is_asked_again_and_again(server, wire, recorder, monkeypatch):
    monkeypatch.setattr("mdevkit_vfio.server.ASK_INTERVAL", 0.02)
    with pytest.raises(MdevError):
        server.let_go(0.2)
    counts = [call[1] for call in recorder.calls if call[0] == "request"]
    assert counts[:3] == [0, 1, 2]


def test_a_device_that_fails_to_ask_is_logged(server, wire, recorder, caplog):
    recorder.fail["request"] = ValueError("a bug")
    with pytest.raises(MdevError):
        server.let_go(0.05)
    assert "failed to ask its client to let go" in caplog.text


def test_force_breaks_the_connection(server, wire, recorder):
    server.let_go(0.01, force=True)
    assert server.client is None
    assert recorder.names()[-1] == "release"
    assert wire.ended()


def test_new_clients_are_refused_while_the_device_is_let_go(server, wire, connect, recorder):
    errors = []
    recorder.during["request"] = lambda: errors.append(refusal(connect(server, hello=False)))
    with pytest.raises(MdevError):
        server.let_go(0.3)
    assert errors == [errno.ENODEV]


@pytest.mark.parametrize("end", [lambda server: server.close(), lambda server: server.let_go(0, force=True)])
def test_a_device_that_does_not_come_back_is_reported(serve, recorder, connect, monkeypatch, end, until):
    monkeypatch.setattr("mdevkit_vfio.server.END_TIMEOUT", 0.1)
    server = serve(recorder)
    released = threading.Event()
    recorder.during["reset"] = lambda: released.wait(20)
    connect(server).send(proto.message(1, Command.DEVICE_RESET))
    until(lambda: "reset" in recorder.names())
    with pytest.raises(MdevError, match="device0 does not come back from its own code") as caught:
        end(server)
    assert caught.value.errno == errno.ETIMEDOUT
    released.set()
    until(lambda: recorder.names()[-1] == "release")


@pytest.mark.parametrize("end", [lambda server: server.close(), lambda server: server.let_go(0, force=True)])
def test_a_client_cannot_have_its_own_device_removed(server, wire, recorder, end):
    errors = []

    def during():
        with pytest.raises(MdevError, match="a request of its own client cannot end device0") as caught:
            end(server)
        errors.append(caught.value.errno)

    recorder.during["reset"] = during
    wire.ask(Command.DEVICE_RESET)
    assert errors == [errno.EDEADLK]


def test_closing_cuts_a_client_off(server, wire, recorder):
    server.close()
    assert wire.ended()
    assert recorder.names()[-1] == "release"
    assert not server.path.exists()


def test_closing_sends_those_away_who_wait(server, connect):
    waiting = connect(server, hello=False)
    waiting.send(VERSION[:16])
    server.close()
    assert waiting.receive()[0].error == errno.ENODEV


def test_a_server_that_fails_says_so(server, connect, until, caplog, monkeypatch):
    def fail(reception, attached, timeout):
        raise ValueError("a bug\nof ours")

    monkeypatch.setattr(Reception, "wait", fail)
    connect(server, hello=False)
    until(lambda: not server.path.exists())
    assert str(server.failure) == "device0 is not served any more: ValueError: a bug of ours"
    assert server.failure.errno == errno.EIO
    assert "device0: the server failed" in caplog.text


def test_a_server_survives_a_shortage_of_descriptors(server, connect, until, caplog, monkeypatch):
    monkeypatch.setattr("mdevkit_vfio.reception.SHORTAGE_PAUSE", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    with socket.socket(socket.AF_UNIX) as sock:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(sock.fileno()))
            sock.connect(str(server.path))
            until(lambda: "no client can be accepted" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
    assert connect(server).read(0, 0, 1) == b"\0"


def test_a_server_survives_a_shortage_of_threads(server, connect, until, caplog, monkeypatch, recorder):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.endswith(" client"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        wire = connect(server, hello=False)
        wire.send(VERSION)
        assert wire.ended()
    # It closes the connection first and tells about it then.
    until(lambda: "device0 cannot serve pid" in caplog.text)
    assert server.client is None
    assert recorder.calls == []
    assert connect(server).read(0, 0, 1) == b"\0"
