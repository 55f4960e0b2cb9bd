"""A stock guest streams text through mtty while the device's host, the service, or both are killed with SIGKILL.

The guest notices nothing: the text comes back whole and in order, and neither its kernel nor QEMU says a word. What becomes of
other clients, of fronts and of consoles is in test_survival.py.
"""

from __future__ import annotations

import os
import random
import re
import socket
import sys
import threading
import time

import pytest

from tests.guests import Guest
from tests.guests.serial import EXCHANGE, ports_at_boot
from tests.services import private_service, wait_until
from tests.survivor import PATIENCE, PLUGINS, Survivor

pytestmark = pytest.mark.alone

SIZE = 24 * 1024
KILLS = 20
#: The text of a run, without what a terminal could take for something else.
TEXT = bytes(random.Random(5).choices(range(32, 127), k=SIZE))
#: Half of it is enough where nothing is slow.
SHORT = TEXT[: SIZE // 2]
#: The guest's own limit is for a machine at rest.
STREAM = EXCHANGE.replace(b"timeout 60", b"timeout 150")
LIMIT = 160


@pytest.fixture
def service():
    """A service, which is started, and of which nothing is left in the end."""
    with private_service(PLUGINS) as running:
        running.start()
        yield running
        if running.process.poll() is None:
            stopped = running.mdevkit("service", "stop", "--remove", "--force")
            assert (stopped.returncode, running.hosts(), running.files()) == (0, {}, []), stopped.stderr


def _check_calm(guest):
    """Neither the guest's kernel nor its driver has seen anything unusual."""
    assert not re.search("too much work|nobody cared|spurious|overrun|LSR safety|Oops", guest.run("dmesg"))
    counters = guest.run("cat /proc/tty/driver/serial")
    assert not re.search(r"\b(oe|fe|pe|brk):", counters), counters


def test_a_stream_is_whole_and_in_order_over_20_deaths_of_the_host(kit, service):
    card = Survivor(service)
    with Guest(kit, card.arguments, files={"exchange": STREAM, "text": TEXT}) as guest:
        (port,) = ports_at_boot(guest)
        killed, streamed = [], threading.Event()
        killer = threading.Thread(target=lambda: killed.append(card.kill_while_it_sends(SIZE, KILLS, streamed)))
        killer.start()
        try:
            guest.run(f"sh /exchange {port} /text", timeout=LIMIT)
        finally:
            streamed.set()
            killer.join()
        assert guest.read(f"/text.{port}") == TEXT
        assert killed == [KILLS]
        assert card.deaths >= KILLS
        _check_calm(guest)
        # And it is a card like any other: reset, and used again.
        guest.reboot()
        guest.write("/tmp/text", b"after all that\n")
        guest.run(f"sh /exchange {port} /tmp/text && cmp /tmp/text /tmp/text.{port}")
    card.report()
    assert card.pauses[-1] < PATIENCE


def _wait_for_carrier(guest, port):
    """Without one, what the guest sends is lost."""
    guest.wait(f"grep -E '^{port.removeprefix('ttyS')}: .*CD' /proc/tty/driver/serial")


class Echo:
    """A program at the port's far end that sends everything back, and takes note of the longest time in which nothing came."""

    def __init__(self, path):
        self.longest = 0.0
        self.heard = 0
        self._peer = socket.socket(socket.AF_UNIX)
        self._peer.connect(path)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        last = 0.0
        while data := self._peer.recv(4096):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last if last else 0.0), now
            self.heard += len(data)
            self._peer.sendall(data)

    def close(self):
        self._peer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._peer.close()


def test_a_stream_does_not_pause_for_the_services_death(kit, service):
    """It is killed in the middle, and started again, of the same stream; then both are killed."""
    far_end = f"{service.folder}/p"
    card = Survivor(service, attributes={"port0": f"unix:{far_end}"})
    hosts = service.hosts()
    with Guest(kit, card.arguments, files={"exchange": STREAM, "text": SHORT}) as guest:
        (port,) = ports_at_boot(guest)
        echo = Echo(far_end)
        _wait_for_carrier(guest, port)
        failures = []

        def kill():
            try:
                wait_until(lambda: echo.heard > len(SHORT) // 4, LIMIT)
                service.kill_service()
                wait_until(lambda: echo.heard > len(SHORT) // 2, LIMIT)
                service.start()
                wait_until(lambda: echo.heard > len(SHORT) * 3 // 4, LIMIT)
                service.kill_service()
            except BaseException as error:
                failures.append(error)
                raise

        killer = threading.Thread(target=kill)
        killer.start()
        guest.run(f"sh /exchange {port} /text", timeout=LIMIT)
        killer.join()
        assert failures == []
        assert guest.read(f"/text.{port}") == SHORT
        assert card.deaths == 0
        assert service.hosts() == hosts
        echo.close()
        sys.stdout.write(f"the service died twice; the longest time without a byte was {echo.longest * 1e3:.1f} ms\n")
        # Now the host dies too. What its far end had is lost, as told in mtty's README; what the guest has is not.
        os.kill(hosts["mtty"], 9)
        service.start()
        assert card.attribute("port0") == f"unix:{far_end}"
        echo = Echo(far_end)
        _wait_for_carrier(guest, port)
        guest.run(f"sh /exchange {port} /text", timeout=LIMIT)
        assert guest.read(f"/text.{port}") == SHORT
        echo.close()
        _check_calm(guest)
    card.report()
    assert len(card.pauses) == 1


def test_the_host_dies_again_and_again_while_the_guest_boots(kit, service):
    """While firmware and kernel find the card, size its registers and set up its interrupt."""
    card = Survivor(service)
    booted = threading.Event()
    killer = threading.Thread(target=_kill_often, args=(card, booted))
    killer.start()
    try:
        guest = Guest(kit, card.arguments, files={"exchange": EXCHANGE, "text": b"Hello\n"})
    finally:
        booted.set()
        killer.join()
    with guest:
        (port,) = ports_at_boot(guest)
        guest.run(f"sh /exchange {port} /text && cmp /text /text.{port}")
        _check_calm(guest)
    card.report()
    assert card.deaths > 2


def _kill_often(card, booted):
    """As often as hosts get to serve: however slow the machine is, a guest that is never answered has a right to an error."""
    while not booted.wait(0.4):
        card.kill()
        card.attribute("port0_tx")
