"""What tests and the demo do with the serial cards of a guest: find their ports, send through them. For the guest's thread."""

from __future__ import annotations

import re
import time

from tests.guests.guest import Guest, GuestError

#: Sends a file to a port and keeps what comes back, of the same size, beside it as FILE.PORT. The descriptor is opened
#: first: a port nobody has open forgets what it received.
EXCHANGE = b"""
stty -F /dev/$1 raw -echo
exec 3<>/dev/$1
timeout 60 head -c $(wc -c <$2) <&3 >$2.$1 &
cat $2 >&3
wait
cmp $2 $2.$1
"""

_PORT = re.compile(r".*/([0-9a-f]+:[0-9a-f]+:[0-9a-f.]+)/\1:\d+/\1:\d+\.\d+/tty/(ttyS\d+)")


def serial_cards(guest: Guest) -> dict[str, list[str]]:
    """Return the names of the ports of every PCI serial card, by the card's address, e.g. ``0000:00:02.0``."""
    cards: dict[str, list[str]] = {}
    for path in guest.run("for port in /sys/class/tty/ttyS*; do readlink -f $port || :; done").split():
        if found := _PORT.fullmatch(path):
            cards.setdefault(found[1], []).append(found[2])
    return cards


def ports_at_boot(guest: Guest) -> list[str]:
    """Return the ports of the card QEMU started with, on the first PCI bus."""
    return next(ports for address, ports in serial_cards(guest).items() if address.startswith("0000:00:"))


def wait_plugged(guest: Guest, count: int, timeout: float = 10) -> list[str]:
    """Wait until the card in the hot-plug slot has `count` ports, 0 for no card, and return them."""
    deadline = time.monotonic() + timeout
    while True:
        cards = [ports for address, ports in serial_cards(guest).items() if not address.startswith("0000:00:")]
        if len(ports := cards[0] if cards else []) == count:
            return ports
        if time.monotonic() > deadline:
            raise GuestError(f"{len(ports)} hot-plugged ports instead of {count}: {guest.run('dmesg | tail -n 20')}")


def send(guest: Guest, port: str, data: bytes) -> bytes:
    """Send `data` through a port and return as much of what comes back; the port is raw and without echo then."""
    guest.write("/tmp/exchange", EXCHANGE)
    guest.write("/tmp/sent", data)
    guest.run(f"sh /tmp/exchange {port} /tmp/sent || true", timeout=70)
    return guest.read(f"/tmp/sent.{port}")
