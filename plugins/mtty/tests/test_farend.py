"""Far ends: real terminals and sockets, programs that come, go, dawdle and flood, and what is left afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import stat
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_mtty.model import MttyDevice
from mdevkit_vfio.uapi import Irq

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR = 0, 1, 2, 2, 3, 4, 5, 6
BULK = 16 * 1024


@pytest.fixture
def opened(card: Any) -> Any:
    """The card as a driver leaves it that has opened both ports: FIFOs on, trigger level 8, DTR and RTS on."""
    for port in (0, 1):
        card.write(port, FCR, 0x81)
        card.write(port, MCR, 0x0B)
    return card


@pytest.fixture
def terminal(opened: Any) -> Iterator[Callable[..., int]]:
    """Open the terminal at the other end of a port."""
    fds: list[int] = []

    def open_terminal(port: int = 0) -> int:
        opened.device.set_far_end(port, "pty")
        fds.append(os.open(opened.device.far_end_path(port), os.O_RDWR | os.O_NOCTTY))
        return fds[-1]

    yield open_terminal
    for fd in fds:
        os.close(fd)


@pytest.fixture
def dial(opened: Any, tmp_path: Path) -> Iterator[Callable[[], socket.socket]]:
    """Connect to the socket at the other end of port 0."""
    opened.device.set_far_end(0, f"unix:{tmp_path}/p0")
    peers: list[socket.socket] = []

    def connect() -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peers.append(peer)
        peer.settimeout(10)
        peer.connect(opened.device.far_end_path(0))
        return peer

    yield connect
    for peer in peers:
        peer.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 10 s"
        time.sleep(0.001)  # the poller needs the interpreter to get on


def carrier(client: Any) -> bool:
    return bool(client.read(0, MSR) & 0x80)


def send(client: Any, port: int, data: bytes) -> None:
    """Write as the stock driver does: 16 bytes whenever the transmitter is empty."""
    for start in range(0, len(data), 16):
        until(lambda: bool(client.read(port, LSR) & 0x20))
        for value in data[start : start + 16]:
            client.write(port, DATA, value)


def fill(client: Any) -> bytes:
    """Write to port 0 until the far end takes no more, for good: the kernel moves bytes on between its buffers for a while."""
    sent = bytearray()
    while client.read(0, LSR) & 0x20:
        while client.read(0, LSR) & 0x20:
            burst = bytes((len(sent) // 16 + n) & 0xFF for n in range(16))
            for value in burst:
                client.write(0, DATA, value)
            sent += burst
            assert len(sent) < 1 << 22
        time.sleep(0.1)  # see above
    return bytes(sent)


def read_all(fd: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        ready, _, _ = select.select([fd], [], [], 10)
        assert ready, f"{len(data)} of {count} bytes"
        data += os.read(fd, count - len(data))
    return bytes(data)


class Reader(threading.Thread):
    """A program on the host that reads `count` bytes, `step` at a time."""

    def __init__(self, fd: int, count: int, step: int = 4096) -> None:
        super().__init__()
        self._fd, self._count, self._step = fd, count, step
        self.data = b""
        self.start()

    def run(self) -> None:
        while len(self.data) < self._count:
            select.select([self._fd], [], [], 20)
            self.data += os.read(self._fd, self._step)

    def result(self) -> bytes:
        self.join(20)
        assert not self.is_alive(), f"{len(self.data)} of {self._count} bytes after 20 s"
        return self.data


# -- terminals ---------------------------------------------------------------------------------------------------------


def test_a_terminal_carries_16_kib_each_way_at_once(opened: Any, terminal: Callable[..., int]):
    fd = terminal()
    downwards, upwards = random.Random(1).randbytes(BULK), random.Random(2).randbytes(BULK)
    reader = Reader(fd, BULK)
    writer = threading.Thread(target=os.writev, args=(fd, [upwards]))
    writer.start()
    received = bytearray()
    for start in range(0, BULK, 16):
        send(opened, 0, downwards[start : start + 16])
        received += opened.receive(0)
    received += opened.receive_exactly(0, BULK - len(received))
    writer.join()
    assert reader.result() == downwards
    assert received == upwards
    counters = opened.device.counters(0)
    assert (counters.tx, counters.rx, counters.overruns) == (BULK, BULK, 0)


def test_a_terminal_is_raw_and_both_ports_have_their_own(opened: Any, terminal: Callable[..., int]):
    every = bytes(range(256))
    fds = [terminal(0), terminal(1)]
    for port, fd in enumerate(fds):
        send(opened, port, every)
        assert read_all(fd, 256) == every
        os.write(fd, every)
        assert opened.receive_exactly(port, 256) == every
    assert opened.receive(0) == opened.receive(1) == b""
    assert len({opened.device.far_end_path(port) for port in (0, 1)}) == 2


def test_a_terminal_interrupts_the_guest(opened: Any, terminal: Callable[..., int]):
    opened.arm(Irq.INTX)
    opened.write(0, IER, 0x05)
    os.write(terminal(), b"x")
    assert opened.fired(Irq.INTX, timeout=10) == 1
    assert (opened.read(0, IIR), opened.read(0, DATA), opened.read(0, IIR)) == (0xCC, 0x78, 0xC1)


def test_a_terminal_that_nobody_reads_holds_the_guest_off_and_loses_nothing(opened: Any, terminal: Callable[..., int]):
    fd = terminal()
    sent = fill(opened)
    assert opened.device.counters(0).overruns == 0
    assert len(sent) > 4096
    assert read_all(fd, len(sent)) == sent
    until(lambda: bool(opened.read(0, LSR) & 0x20))


def test_a_full_transmitter_wakes_the_guest_when_the_reader_comes(opened: Any, terminal: Callable[..., int]):
    """The reader takes some and pauses, the case in which the kernel may forget to tell that there is room."""
    fd = terminal()
    opened.arm(Irq.INTX)
    for _ in range(5):
        fill(opened)
        opened.write(0, IER, 0x02)
        assert opened.fired(Irq.INTX) == 0
        read_all(fd, 4000)
        assert opened.fired(Irq.INTX, timeout=10) == 1
        assert opened.read(0, IIR) == 0xC2
        opened.write(0, IER, 0x00)
        opened.mask(False)


def test_a_terminal_outlives_its_programs(opened: Any, terminal: Callable[..., int]):
    """Between two programs nothing is lost in either direction."""
    terminal()
    path = opened.device.far_end_path(0)
    for round_ in range(3):
        text = f"round {round_}".encode()
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        os.write(fd, text)
        os.close(fd)
        send(opened, 0, text[::-1])
        assert opened.receive_exactly(0, len(text)) == text
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        assert read_all(fd, len(text)) == text[::-1]
        os.close(fd)


def slaves(path: str) -> list[int]:
    """This process's descriptors of a terminal."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(entry.readlink()) == path:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("mcr", [0x0B, 0x00])
def test_a_hung_up_terminal_is_opened_anew(opened: Any, mcr: int):
    """A hang-up kills every descriptor of the slave; what the kernel says then (EIO) comes of closing the last one, too."""
    opened.device.set_far_end(0, "pty")
    opened.write(0, MCR, mcr)
    path = opened.device.far_end_path(0)
    (held,) = slaves(path)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, held)
    os.close(null)
    until(lambda: len(slaves(path)) == 1)
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        assert not termios.tcgetattr(fd)[3] & (termios.ECHO | termios.ICANON)
        opened.write(0, MCR, 0x0B)
        os.write(fd, b"up")
        send(opened, 0, b"down")
        assert read_all(fd, 4) == b"down"
        assert opened.receive_exactly(0, 2) == b"up"
    finally:
        os.close(fd)


# -- sockets -----------------------------------------------------------------------------------------------------------


def test_a_socket_carries_16_kib_each_way_at_once(opened: Any, dial: Callable[[], socket.socket]):
    peer = dial()
    until(lambda: carrier(opened))
    downwards, upwards = random.Random(4).randbytes(BULK), random.Random(5).randbytes(BULK)
    reader = Reader(peer.fileno(), BULK, step=7)
    writer = threading.Thread(target=peer.sendall, args=(upwards,))
    writer.start()
    received = bytearray()
    for start in range(0, BULK, 16):
        send(opened, 0, downwards[start : start + 16])
        received += opened.receive(0)
    received += opened.receive_exactly(0, BULK - len(received))
    writer.join()
    assert reader.result() == downwards
    assert received == upwards


def test_without_a_peer_the_cable_is_unplugged(opened: Any, dial: Callable[[], socket.socket]):
    assert opened.read(0, MSR) == 0x38
    assert opened.read(0, MSR) == 0x30
    send(opened, 0, b"lost" * 100)
    assert opened.read(0, LSR) == 0x60
    peer = dial()
    until(lambda: carrier(opened))
    send(opened, 0, b"heard")
    assert peer.recv(100) == b"heard"
    peer.close()
    until(lambda: not carrier(opened))


def test_the_carrier_interrupts_the_guest(opened: Any, dial: Callable[[], socket.socket]):
    opened.read(0, MSR)
    opened.arm(Irq.INTX)
    opened.write(0, IER, 0x08)
    peer = dial()
    assert opened.fired(Irq.INTX, timeout=10) == 1
    assert (opened.read(0, IIR), opened.read(0, MSR)) == (0xC0, 0xB8)
    opened.mask(False)
    peer.close()
    assert opened.fired(Irq.INTX, timeout=10) == 1
    assert (opened.read(0, IIR), opened.read(0, MSR)) == (0xC0, 0x38)


def test_the_carrier_interrupts_the_guest_when_it_has_read_the_last_byte(opened: Any, dial: Callable[[], socket.socket]):
    """The peer has left long before; its carrier falls inside a read of the guest's."""
    peer = dial()
    until(lambda: carrier(opened))
    opened.read(0, MSR)
    opened.arm(Irq.INTX)
    opened.write(0, IER, 0x08)
    peer.sendall(b"x" * 20)
    peer.close()
    until(lambda: bool(opened.device.counters(0).rx == 16))
    assert opened.fired(Irq.INTX, timeout=0.1) == 0
    for _ in range(20):
        assert opened.read(0, DATA) == 0x78
    assert opened.fired(Irq.INTX) == 1


def test_a_peer_that_leaves_is_heard_to_the_end_before_the_next(opened: Any, dial: Callable[[], socket.socket]):
    first, second = dial(), dial()
    first.sendall(b"1" * 1000)
    second.sendall(b"2" * 1000)
    first.close()
    assert opened.receive_exactly(0, 2000) == b"1" * 1000 + b"2" * 1000
    send(opened, 0, b"for two")
    assert second.recv(100) == b"for two"


def test_the_guest_sees_the_carrier_fall_between_two_peers(opened: Any, dial: Callable[[], socket.socket]):
    first = dial()
    until(lambda: carrier(opened))
    dial()
    first.close()
    until(lambda: bool(opened.read(0, MSR) & 0x08))
    until(lambda: carrier(opened))


def test_a_peer_that_stops_sending_still_listens(opened: Any, dial: Callable[[], socket.socket]):
    peer = dial()
    peer.sendall(b"question")
    peer.shutdown(socket.SHUT_WR)
    assert opened.receive_exactly(0, 8) == b"question"
    assert carrier(opened)
    send(opened, 0, b"answer")
    assert peer.recv(100) == b"answer"
    peer.close()
    until(lambda: not carrier(opened))


def test_a_peer_that_leaves_while_the_port_is_closed_is_not_forgotten(opened: Any, dial: Callable[[], socket.socket]):
    """Without RTS nothing is read: an empty-handed peer goes at once, one that has sent waits to be heard."""
    opened.write(0, MCR, 0)
    peer = dial()
    until(lambda: carrier(opened))
    peer.close()
    until(lambda: not carrier(opened))
    peer = dial()
    peer.sendall(b"early")
    peer.close()
    until(lambda: carrier(opened))
    time.sleep(0.05)  # the time a byte that is wrongly taken needs to arrive
    assert opened.receive(0) == b""
    opened.write(0, MCR, 0x0B)
    assert opened.receive_exactly(0, 5) == b"early"
    until(lambda: not carrier(opened))


def test_a_peer_that_dies_with_bytes_unread_is_gone(opened: Any, dial: Callable[[], socket.socket]):
    peer = dial()
    until(lambda: carrier(opened))
    send(opened, 0, b"never read")
    peer.close()
    until(lambda: not carrier(opened))
    send(opened, 0, b"lost")
    assert opened.read(0, LSR) == 0x60


def test_a_peer_that_does_not_read_holds_only_its_port_off(opened: Any, dial: Callable[[], socket.socket]):
    dial()
    until(lambda: carrier(opened))
    fill(opened)
    before = time.monotonic()
    for value in range(64):
        opened.write(1, DATA, value)
        assert opened.read(1, DATA) == value
    assert time.monotonic() - before < 1


def test_a_flood_from_the_host_waits_there(opened: Any, dial: Callable[[], socket.socket]):
    peer = dial()
    peer.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 1 << 26:
            sent += peer.send(b"\0" * 4096)
    assert sent < 1 << 26
    assert opened.device.counters(0).rx <= 16
    opened.write(1, DATA, 0x41)
    assert opened.read(1, DATA) == 0x41


def test_the_socket_is_private_from_the_first_moment(tmp_path: Path, card: Any):
    umask = os.umask(0)
    try:
        card.device.set_far_end(0, f"unix:{tmp_path}/p0")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "p0").stat().st_mode) == 0o600
    card.device.set_far_end(0, "loopback")
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_file_stays(tmp_path: Path, card: Any):
    card.device.set_far_end(0, f"unix:{tmp_path}/p0")
    (tmp_path / "p0").unlink()
    (tmp_path / "p0").write_text("mine")
    card.device.close()
    assert (tmp_path / "p0").read_text() == "mine"


def test_a_relative_path_is_taken_from_where_we_are(tmp_path: Path, card: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    card.device.set_far_end(0, "unix:p0")
    assert card.device.far_end_path(0) == f"{tmp_path}/p0"
    monkeypatch.chdir("/")
    card.device.close()
    assert not (tmp_path / "p0").exists()


# -- what can go wrong -------------------------------------------------------------------------------------------------


def refusal(card: Any, path: str) -> tuple[int | None, str]:
    with pytest.raises(MdevError) as caught:
        card.device.set_far_end(0, f"unix:{path}")
    assert card.device.far_end(0) == "loopback"
    assert card.device.far_end_path(0) == ""
    return caught.value.errno, str(caught.value)


def test_a_path_that_is_too_long_is_refused(card: Any, tmp_path: Path):
    fits = f"{tmp_path}/".ljust(107, "x")
    card.device.set_far_end(0, f"unix:{fits}")
    assert Path(fits).is_socket()
    card.device.set_far_end(0, "loopback")
    text = f"{fits}x has 108 bytes, a socket's path may have 107"
    assert refusal(card, fits + "x") == (errno.ENAMETOOLONG, text)
    umlauts = "/" + "ä" * 54
    assert refusal(card, umlauts)[1] == f"{umlauts} has 109 bytes, a socket's path may have 107"


def test_a_missing_folder_is_refused(card: Any, tmp_path: Path):
    text = f"cannot listen at {tmp_path}/no/p0: the folder {tmp_path}/no does not exist"
    assert refusal(card, f"{tmp_path}/no/p0") == (errno.ENOENT, text)


def test_a_file_in_place_of_a_folder_is_refused(card: Any, tmp_path: Path):
    (tmp_path / "file").touch()
    text = f"cannot listen at {tmp_path}/file/p0: {tmp_path}/file is not a folder"
    assert refusal(card, f"{tmp_path}/file/p0") == (errno.ENOTDIR, text)


@pytest.mark.parametrize(
    ("kind", "why"), [("file", "something that is no socket is there"), ("socket", "another server listens there")]
)
def test_a_taken_path_is_refused_and_left_alone(card: Any, tmp_path: Path, kind: str, why: str):
    path = tmp_path / "p0"
    with socket.socket(socket.AF_UNIX) as other:
        if kind == "socket":
            other.bind(str(path))
            other.listen()
        else:
            path.write_text("mine")
        assert refusal(card, str(path)) == (errno.EADDRINUSE, f"{path} is taken: {why}")
    assert path.exists()


def test_a_socket_nobody_listens_on_any_more_is_replaced(card: Any, tmp_path: Path):
    """As a process leaves it that was killed."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/p0")
    card.device.set_far_end(0, f"unix:{tmp_path}/p0")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"{tmp_path}/p0")
        until(lambda: carrier(card))


def test_sockets_are_made_by_whom_the_device_was_given(
    connect: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It gets the whole path, since its folder may be another; what it raises is told, what it makes need not be set up."""
    asked = []

    def listen(path: str) -> socket.socket:
        asked.append(path)
        if path.endswith("refused"):
            raise MdevError(errno.EPERM, f"{path} is not yours")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        return listener

    monkeypatch.chdir(tmp_path)
    card = connect(MttyDevice(1, listen=listen))
    assert refusal(card, "refused") == (errno.EPERM, f"{tmp_path}/refused is not yours")
    card.device.set_far_end(0, "unix:p0")
    assert asked == [f"{tmp_path}/refused", f"{tmp_path}/p0"]
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect("p0")
            until(lambda: carrier(card))
        until(lambda: not carrier(card))
    card.device.set_far_end(0, "loopback")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")  # since Python 3.12
def test_a_folder_without_permission_is_refused(card: Any, tmp_path: Path):
    """Asked in a process that is not root's."""
    tmp_path.chmod(0o500)
    outcome, report = os.pipe()
    child = os.fork()
    if not child:
        try:
            if not os.getuid():
                os.setuid(65534)
            card.device.set_far_end(0, f"unix:{tmp_path}/p0")
        except MdevError as error:
            os.write(report, f"{error.name} {error}".encode())
        finally:
            os._exit(0)
    os.close(report)
    os.waitpid(child, 0)
    with os.fdopen(outcome) as text:
        assert text.read() == f"EACCES cannot listen at {tmp_path}/p0: no permission to make files in {tmp_path}"
    tmp_path.chmod(0o700)


def test_a_refused_change_keeps_the_far_end_there_was(card: Any, tmp_path: Path):
    card.device.set_far_end(0, f"unix:{tmp_path}/p0")
    with pytest.raises(MdevError, match=f"{tmp_path}/p0 is taken"):
        card.device.set_far_end(1, f"unix:{tmp_path}/p0")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"{tmp_path}/p0")
        until(lambda: carrier(card))
    assert [card.device.far_end(port) for port in (0, 1)] == [f"unix:{tmp_path}/p0", "loopback"]


# -- life --------------------------------------------------------------------------------------------------------------


def pollers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mtty")]


def test_there_is_a_thread_only_while_there_is_a_far_end(card: Any, tmp_path: Path):
    assert pollers() == []
    card.device.set_far_end(0, "pty")
    card.device.set_far_end(1, f"unix:{tmp_path}/p1")
    assert len(pollers()) == 1
    card.device.set_far_end(0, "loopback")
    assert len(pollers()) == 1
    card.device.set_far_end(1, "loopback")
    assert pollers() == []


def test_the_same_far_end_again_changes_nothing(card: Any, tmp_path: Path):
    for spec in ("pty", f"unix:{tmp_path}/p0"):
        card.device.set_far_end(0, spec)
        path = card.device.far_end_path(0)
        card.device.set_far_end(0, spec)
        assert card.device.far_end_path(0) == path


def test_a_change_moves_what_waits_to_the_new_far_end(opened: Any, terminal: Callable[..., int], tmp_path: Path):
    terminal()
    sent = fill(opened)
    opened.device.set_far_end(0, "loopback")
    tail = opened.receive(0)
    assert tail
    assert sent.endswith(tail)


def test_far_ends_outlive_clients_and_resets(opened: Any, terminal: Callable[..., int], dial: Callable[[], socket.socket]):
    peer = dial()
    until(lambda: carrier(opened))
    fd = terminal(1)
    paths = [opened.device.far_end_path(port) for port in (0, 1)]
    opened.device.reset()
    opened.restart()
    os.write(fd, b"t")
    peer.sendall(b"s")
    for port in (0, 1):
        opened.write(port, MCR, 0x0B)
    assert [opened.receive_exactly(port, 1) for port in (0, 1)] == [b"s", b"t"]
    assert [opened.device.far_end_path(port) for port in (0, 1)] == paths


def test_bytes_wait_for_the_guest_to_open_its_port(card: Any):
    """What is typed before the driver has cleared its FIFOs and raised RTS is not lost by that clearing."""
    card.device.set_far_end(0, "pty")
    fd = os.open(card.device.far_end_path(0), os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(fd, b"typed early")
        time.sleep(0.05)  # the time a byte that is wrongly taken needs to arrive
        for value in (0x01, 0x07, 0x00, 0x01, 0x81):
            card.write(0, FCR, value)
        card.write(0, MCR, 0x0B)
        assert card.receive_exactly(0, 11) == b"typed early"
    finally:
        os.close(fd)


def test_nothing_can_be_set_on_a_closed_device(card: Any):
    card.device.close()
    with pytest.raises(MdevError, match="far end pty: the device is being removed") as caught:
        card.device.set_far_end(0, "pty")
    assert caught.value.errno == errno.ENODEV


def test_changes_from_many_threads_leave_one_far_end(card: Any, tmp_path: Path):
    def change(number: int) -> None:
        for round_ in range(20):
            card.device.set_far_end(number % 2, ("pty", "loopback", f"unix:{tmp_path}/{number}")[(number + round_) % 3])

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pollers()) <= 1
    card.device.close()
    assert list(tmp_path.iterdir()) == []


# -- any program -------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("host"), st.integers(1, 200)),
        st.tuples(st.just("guest"), st.integers(1, 40)),
        st.tuples(st.just("read"), st.integers(1, 40)),
        st.tuples(st.just("trigger"), st.sampled_from([0x01, 0x41, 0x81, 0xC1])),
        st.tuples(st.just("enable"), st.integers(0, 15)),
        st.tuples(st.just("modem"), st.sampled_from([0x00, 0x01, 0x02, 0x03, 0x0B])),
        st.tuples(st.just("look"), st.sampled_from([IER, IIR, LCR, MCR, LSR, MSR])),
    ),
    max_size=60,
)


@pytest.mark.parametrize("spec", ["pty", "unix"])
def test_nothing_is_lost_or_reordered_whatever_the_program(
    connect: Callable[..., Any], tmp_path: Path, spec: str, request: pytest.FixtureRequest
):
    """Random register accesses and writes from the host: each direction's bytes arrive, once and in order."""
    client = connect(MttyDevice(1))
    client.device.set_far_end(0, "pty" if spec == "pty" else f"unix:{tmp_path}/p0")
    if spec == "pty":
        fd = os.open(client.device.far_end_path(0), os.O_RDWR | os.O_NOCTTY)
        request.addfinalizer(lambda: os.close(fd))
    else:
        peer = socket.socket(socket.AF_UNIX)
        request.addfinalizer(peer.close)
        peer.connect(client.device.far_end_path(0))
        fd = peer.fileno()
        until(lambda: carrier(client))

    @settings(max_examples=40, deadline=None)
    @given(STEPS)
    def run(steps: list[tuple[str, int]]) -> None:
        typed, printed, got = bytearray(), bytearray(), bytearray()
        chance = random.Random(len(steps))
        client.write(0, FCR, 0x01)
        for step, value in steps:
            if step == "host":
                data = chance.randbytes(value)
                os.write(fd, data)
                typed.extend(data)
            elif step == "guest":
                for byte in chance.randbytes(value):
                    if client.read(0, LSR) & 0x20:
                        client.write(0, DATA, byte)
                        printed.append(byte)
            elif step == "read":
                for _ in range(value):
                    if client.read(0, LSR) & 1:
                        got.append(client.read(0, DATA))
            elif step == "look":
                client.read(0, value)
            else:
                client.write(0, {"trigger": FCR, "enable": IER, "modem": MCR}[step], value)
        client.write(0, MCR, 0x0B)
        got.extend(client.receive_exactly(0, len(typed) - len(got)))
        assert got == typed
        assert read_all(fd, len(printed)) == printed
        assert client.receive(0) == b""

    run()
