"""mtty-2 in a stock Debian guest under QEMU: the kernel's own 8250_pci driver drives a card written in Python.

Everything runs twice, in a guest whose memory devices can map and in one whose memory they cannot.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import time

import pytest

from tests.guests import Device, Guest
from tests.guests.serial import EXCHANGE, ports_at_boot, serial_cards, wait_plugged

#: What one exchange sends through a port; a byte each way costs about 0.3 ms.
SIZE = 16 * 1024


def _pattern(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)  # a fixed sequence in which a lost or swapped byte shows


FILES = {
    "exchange": EXCHANGE,
    "text": b"Hello from the guest\n",
    "first": _pattern(1, 2048),
    "second": _pattern(2, 2048),
    "big": _pattern(3),
}


def _boot(kit, device, shared_memory):
    return Guest(kit, device.arguments, shared_memory=shared_memory, files=FILES)


def _assert_text_comes_back(guest, ports):
    for port in ports:
        assert guest.run(f"sh /exchange {port} /text && cat /text.{port}") == FILES["text"].decode()


@pytest.fixture(scope="module", params=[True, False], ids=["shared-memory", "private-memory"])
def shared_memory(request):
    return request.param


@pytest.fixture(scope="module")
def guest(kit, shared_memory):
    with Device("mtty-2") as device, _boot(kit, device, shared_memory) as guest:
        yield guest


def test_the_kernels_own_driver_binds_both_ports(guest):
    assert guest.run("uname -v").startswith("#1 SMP PREEMPT_DYNAMIC Debian")
    (address, ports), *others = serial_cards(guest).items()
    assert (ports, others) == (["ttyS1", "ttyS2"], [])
    folder = f"/sys/bus/pci/devices/{address}"
    assert guest.run(f"cat {folder}/vendor {folder}/device").split() == ["0x4348", "0x3253"]
    assert guest.run(f"readlink {folder}/driver").strip().endswith("/bus/pci/drivers/serial")
    messages = guest.run("dmesg")
    for port in ports:
        assert re.search(rf"{address}: {port} at I/O 0x\w+ \(irq = \d+, base_baud = 115200\) is a 16550A", messages)


def test_text_comes_back_on_each_port(guest):
    _assert_text_comes_back(guest, ports_at_boot(guest))


def test_both_ports_at_once(guest):
    one, two = ports_at_boot(guest)
    command = f"sh /exchange {one} /first & first=$!; sh /exchange {two} /second & wait $first && wait $!"
    assert guest.run(command) == ""
    assert guest.read(f"/first.{one}") == FILES["first"]
    assert guest.read(f"/second.{two}") == FILES["second"]


def test_the_driver_has_no_complaint(guest):
    """What 8250 and the interrupt core say of a card that misbehaves."""
    assert not re.search("too much work|nobody cared|spurious|overrun|LSR safety", guest.run("dmesg"))
    counters = guest.run("cat /proc/tty/driver/serial")
    assert not re.search(r"\b(oe|fe|pe|brk):", counters), counters


@contextlib.contextmanager
def _plugged(guest, device):
    """Hot-plug a card and give its ports; afterwards the slot is empty again."""
    guest.plug("card", device.description)
    try:
        yield wait_plugged(guest, 2)
    finally:
        guest.unplug("card")
    wait_plugged(guest, 0)


def test_hot_plug_and_unplug_of_a_card(guest):
    before = serial_cards(guest)
    with Device("mtty-2") as device:
        for _ in range(2):
            with _plugged(guest, device) as ports:
                _assert_text_comes_back(guest, ports)
            assert serial_cards(guest) == before


def test_unplug_while_the_port_is_in_use(guest):
    with Device("mtty-2") as device:
        with _plugged(guest, device) as (port, _):
            guest.run(f"stty -F /dev/{port} raw -echo")
            guest.run(f"(yes >/dev/{port}; echo $? >/yes) 2>/dev/null & cat /dev/{port} >/stream &")
            guest.wait("test $(wc -c </stream) -gt 1000")
        assert guest.wait("cat /yes").strip() == "1"
    _assert_text_comes_back(guest, ports_at_boot(guest))
    assert not re.search(r"Oops|BUG:|WARNING:", guest.run("dmesg"))


def test_16_kib_each_way_through_a_pty(guest):
    answer = _pattern(4)
    with Device("mtty-2", {"port0": "pty"}) as device, _plugged(guest, device) as (port, _):
        guest.run(f"(sh /exchange {port} /big; touch /done) >/log 2>&1 &")
        assert _pump(device.terminals[0], answer, SIZE) == FILES["big"]
        guest.wait("test -e /done", timeout=30)
        assert guest.read(f"/big.{port}") == answer


def _pump(path: str, data: bytes, count: int, timeout: float = 60) -> bytes:
    """Write `data` to a terminal and read `count` bytes from it, both at once, as the two ends of a cable do.

    Waits for the guest to send first: a port that is opened drops what came before.
    """
    received = bytearray()
    deadline = time.monotonic() + timeout
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        while len(received) < count or data:
            assert time.monotonic() < deadline, f"{len(received)} of {count} bytes came, {len(data)} are left to send"
            readable, writable, _ = select.select([terminal], [terminal] if data and received else [], [], 1)
            if readable:
                received += os.read(terminal, 4096)
            if writable:
                data = data[os.write(terminal, data[:512]) :]
    finally:
        os.close(terminal)
    return bytes(received)


def test_works_again_after_the_guest_rebooted(guest):
    guest.reboot()
    _assert_text_comes_back(guest, ports_at_boot(guest))


def test_a_second_qemu_attaches_after_the_first_was_killed(kit, shared_memory):
    with Device("mtty-2") as device:
        with _boot(kit, device, shared_memory) as first:
            port, _ = ports_at_boot(first)
            first.run(f"stty -F /dev/{port} raw -echo; yes >/dev/{port} & cat /dev/{port} >/dev/null &")
            first.kill()
        with _boot(kit, device, shared_memory) as second:
            _assert_text_comes_back(second, ports_at_boot(second))
        assert device.close() == 0, device.output
