"""``mdevkit console`` as a person and a script use it: real processes, a real terminal, our vfio-user client as the guest."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from mdevkit_vfio.client import VfioUserClient

from tests.services import foreground, private_service, wait_until

MDEVKIT = Path(sys.executable).with_name("mdevkit")
UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00c"
DATA, MCR, LSR = 0, 4, 5


@pytest.fixture
def service():
    with private_service("mdevkit-mtty,mdevkit-vfio") as running:
        yield running


@pytest.fixture
def run(service):
    """Starts a device in the foreground and returns its process and facts."""
    with foreground(service, UUID) as start:
        yield start


@pytest.fixture
def guest():
    """Attaches to a device and opens its ports, as a guest's driver does: RTS lets bytes in."""
    clients = []

    def attach(path):
        client = VfioUserClient.connect(path)
        clients.append(client)
        client.region(0).write_int(MCR, 1, 0x02)
        return Guest(client)

    yield attach
    for client in clients:
        client.close()


class Guest:
    """A driver of port 0."""

    def __init__(self, client):
        self.port = client.region(0)

    def say(self, data):
        for byte in data:
            wait_until(lambda: self.port.read_int(LSR, 1) & 0x20, what="room in the transmitter")
            self.port.write_int(DATA, 1, byte)

    def hear(self, count):
        data = bytearray()
        while len(data) < count:
            wait_until(lambda: self.port.read_int(LSR, 1) & 0x01, what=f"a byte after {bytes(data)}")
            data.append(self.port.read_int(DATA, 1))
        return bytes(data)


class Terminal:
    """A pseudo-terminal with a person at it, and `mdevkit console` in it."""

    def __init__(self, environment, *words):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.shown = b""
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = subprocess.Popen([MDEVKIT, "console", *words], env=environment, start_new_session=True, **streams)

    def type(self, data):
        os.write(self.master, data)

    def shows(self, text):
        deadline = time.monotonic() + 10
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text} did not come: {self.shown}"
            self.shown += os.read(self.master, 4096)

    def is_raw(self):
        return not termios.tcgetattr(self.slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)

    def ends(self):
        code = self.process.wait(10)
        assert termios.tcgetattr(self.slave) == self.before, "the terminal is as it was"
        return code

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(service):
    """Opens a console in a terminal."""
    opened = []

    def open_(*words):
        opened.append(Terminal(service.environment, *words))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


def talk(terminal, guest):
    """A word each way; keys that usually do something are the guest's."""
    terminal.shows(b"connected to port0; Ctrl-] leaves")
    wait_until(terminal.is_raw, what="raw mode")
    terminal.type(b"hi\x03\x1a\r")
    assert guest.hear(5) == b"hi\x03\x1a\r"
    guest.say(b"login: \x1b[1m")
    terminal.shows(b"login: \x1b[1m")


def pipe(service, *words, data=b""):
    return subprocess.run(
        [MDEVKIT, "console", *words], input=data, capture_output=True, env=service.environment, timeout=30, check=False
    )


def console(service, **streams):
    return subprocess.Popen([MDEVKIT, "console", UUID], stdin=subprocess.PIPE, env=service.environment, **streams)


def fails(result, *words):
    """One line on stderr, exit code 1."""
    assert (result.returncode, result.stdout) == (1, b""), result
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr.decode()


# -- a terminal --------------------------------------------------------------------------------------------------------


def test_a_terminal_talks_to_the_guest_until_the_escape(run, guest, terminal):
    _, facts = run("mtty-1", "--set", "port0=pty")
    other = guest(facts["socket"])
    person = terminal(UUID[:6])
    talk(person, other)
    person.type(b"bye\x1dnot this")
    assert person.ends() == 0
    assert other.hear(3) == b"bye"
    assert not other.port.read_int(LSR, 1) & 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_restores_the_terminal(run, terminal, number):
    run("mtty-1", "--set", "port0=pty")
    person = terminal(UUID)
    wait_until(person.is_raw, what="raw mode")
    person.process.send_signal(number)
    assert person.ends() == 128 + number


def test_the_escape_works_while_the_guest_takes_nothing(run, terminal, tmp_path):
    """Without RTS the socket fills up."""
    run("mtty-1", "--set", f"port0=unix:{tmp_path}/p0")
    person = terminal(UUID)
    wait_until(person.is_raw, what="raw mode")
    for _ in range(200):
        person.type(b"x" * 2048)
    person.type(b"\x1d")
    assert person.ends() == 0


@pytest.mark.parametrize("far_end", ["pty", "unix:{}/p0"])
def test_a_device_that_goes_ends_it_and_restores_the_terminal(run, guest, terminal, tmp_path, far_end):
    device, facts = run("mtty-1", "--set", "port0=" + far_end.format(tmp_path))
    person = terminal(UUID)
    talk(person, guest(facts["socket"]))
    device.terminate()
    person.shows(b"the device has closed port0 [ENODEV]")
    assert person.ends() == 1


# -- a pipe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far_end", ["pty", "unix:{}/p0"])
def test_a_pipe_goes_both_ways_and_ends_when_it_is_quiet(service, run, guest, tmp_path, far_end):
    _, facts = run("mtty-1", "--set", "port0=" + far_end.format(tmp_path))
    other = guest(facts["socket"])
    with console(service, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as it:
        it.stdin.write(b"date\x1d\n")
        it.stdin.close()
        assert other.hear(6) == b"date\x1d\n", "the escape is a person's"
        other.say(b"Thu\r\n" * 20)
        assert it.stdout.read() == b"Thu\r\n" * 20
        assert it.stderr.read() == b""
        assert it.wait(10) == 0


def test_more_than_one_read_brings_arrives_whole(service, run, guest):
    _, facts = run("mtty-1", "--set", "port0=pty")
    other = guest(facts["socket"])
    data = os.urandom(6 << 10)
    with console(service) as it:
        it.stdin.write(data)
        it.stdin.close()
        assert other.hear(len(data)) == data
        assert it.wait(10) == 0


def test_a_pipe_is_held_off_while_the_guest_takes_nothing(service, run):
    run("mtty-1", "--set", "port0=pty")
    with console(service) as it:
        os.set_blocking(it.stdin.fileno(), False)
        sent = 0
        while sent < 1 << 22 and select.select([], [it.stdin], [], 2)[1]:
            sent += os.write(it.stdin.fileno(), bytes(4096))
        it.kill()
    assert 1 << 16 < sent < 1 << 20


def test_a_reader_that_has_seen_enough_ends_it_quietly(service, run, guest):
    _, facts = run("mtty-1", "--set", "port0=pty")
    with console(service, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as it:
        it.stdout.close()
        guest(facts["socket"]).say(b"hello")
        assert it.wait(10) == 1
        assert it.stderr.read() == b""


# -- the service -------------------------------------------------------------------------------------------------------


def test_a_port_on_loopback_is_switched_in_the_service(service, guest, terminal):
    service.start()
    with service.client() as client:
        device = client.post("/v1/devices", {"type": "mtty-2", "uuid": UUID})
        other = guest(device["endpoint"]["socket"])
        person = terminal(UUID[:8])
        person.shows(b"port0 was on loopback; it is set to pty now")
        talk(person, other)
        person.type(b"\x1d")
        assert person.ends() == 0
        assert client.get(f"/v1/devices/{UUID}/attributes/port0") == {"value": "pty"}
        assert pipe(service, UUID).stderr == b"", "it is a terminal already"
        assert pipe(service, UUID, "--port", "1").stderr == b"port1 was on loopback; it is set to pty now\n"


def test_what_the_device_does_not_let_us_is_told(service):
    service.start()
    with service.client() as client:
        client.post("/v1/devices", {"type": "mtty-1", "uuid": UUID, "attributes": {"compat": "linux"}})
        fails(pipe(service, UUID), "port 0 of a device with compat=linux is always loopback, not pty", "EINVAL")


def test_a_device_without_a_console_says_so(service):
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-demo"
    service.start()
    with service.client() as client:
        type_ = client.get("/v1/parents")[0]["types"][0]["id"]
        client.post("/v1/devices", {"type": type_, "uuid": UUID})
        fails(pipe(service, UUID), f"device {UUID} has no console", "EOPNOTSUPP")


# -- what can go wrong -------------------------------------------------------------------------------------------------


def test_the_first_port_that_leads_somewhere_is_taken(service, run):
    run("mtty-2", "--set", "port1=pty")
    assert pipe(service, UUID).returncode == 0
    fails(pipe(service, UUID, "--port", "0"), "port0", "leads nowhere (loopback)", "mdevkit run --set port0=pty", "ENOTCONN")
    fails(pipe(service, UUID, "--port", "2"), f"device {UUID} has no console 2 (there are: port0, port1)", "ENOENT")


def test_no_such_device(service):
    fails(pipe(service, UUID), f"there is no running device '{UUID}'", "ENODEV")


def test_a_socket_that_has_gone_is_named(service, run, tmp_path):
    run("mtty-1", "--set", f"port0=unix:{tmp_path}/p0")
    (tmp_path / "p0").unlink()
    fails(pipe(service, UUID), f"port0: cannot open {tmp_path}/p0: No such file or directory", "ENOENT")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/p0")
    fails(pipe(service, UUID), f"port0: cannot open {tmp_path}/p0: Connection refused", "ECONNREFUSED")
