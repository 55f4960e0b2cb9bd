"""The demo, ``./dev demo``: a guest boots, its own driver finds a serial card written in Python, and text goes round.

Where no guest can boot, our own vfio-user client does to the card's registers what the driver would do, and the user is
told so and how to get a guest. Everything it starts ends with it.
"""

from __future__ import annotations

import random
import re
import sys
import time

from mdevkit_vfio.client import RegionClient, VfioUserClient

from tests.guests import Device, DeviceError, Guest, GuestError, Kit, MissingKitError, find_kit
from tests.guests.serial import EXCHANGE, ports_at_boot, send

TEXT = "Hello from the guest\n"
#: Bytes sent through both ports at once; each way of a byte costs about 0.15 ms.
BLOCK = 2048

#: What the user reads where no guest can boot.
_INSTEAD = """
{missing}
(Or take your distribution's: QEMU 10.1 is the first that will do. On Debian 13 with backports:
apt-get install -t trixie-backports qemu-system-x86 busybox-static)
Our own vfio-user client takes the place of the guest and its driver now.

"""

_WAIT = 5.0  # seconds for one character to come back


class DemoError(Exception):
    """What came back is not what was sent."""


class Stopwatch:
    """Prints lines with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        sys.stdout.write(f"{time.monotonic() - self._start:5.1f} s  {text}\n")
        sys.stdout.flush()


def in_guest(kit: Kit, device: Device, watch: Stopwatch) -> None:
    """Boot a guest beside the card and send text through both ports; DemoError if it does not come back."""
    watch.say(f"QEMU {kit.version()} boots {kit.kernel} with it")
    with Guest(kit, device.arguments, files={"exchange": EXCHANGE, "block": random.randbytes(BLOCK)}) as guest:
        watch.say(f"the guest is up: {guest.run('uname -srv').strip()}")
        ports = ports_at_boot(guest)
        for line in guest.run("dmesg").splitlines():
            if re.search("|".join(rf"\b{port}\b" for port in ports), line):
                watch.say(f"  its driver: {line.partition('] ')[2]}")
        for port in ports:
            back = send(guest, port, TEXT.encode())
            watch.say(f"  /dev/{port}: sent {TEXT!r}, came back {back.decode(errors='replace')!r}")
            _check(back == TEXT.encode())
        started = time.monotonic()
        guest.run("".join(f"sh /exchange {port} /block & " for port in ports) + "wait", timeout=90)
        rate = len(ports) * BLOCK / (time.monotonic() - started)
        _check(len({guest.read(path) for path in ("/block", *(f"/block.{port}" for port in ports))}) == 1)
        watch.say(f"  {BLOCK} bytes through each port, both at once: identical; {rate:.0f} bytes/s there and back")


def by_client(device: Device, watch: Stopwatch) -> None:
    """Do what the guest's driver does to the card's registers; DemoError if a text does not come back."""
    with VfioUserClient.connect(device.socket) as client:
        vendor, card = client.config.read_int(0, 2), client.config.read_int(2, 2)
        watch.say(f"our vfio-user client sees PCI device {vendor:04x}:{card:04x}")
        client.config.write_int(4, 2, 1)  # command register: answer to I/O accesses
        for number in (0, 1):
            port = client.region(number)  # port N is BAR N
            _set_up(port)
            started = time.monotonic()
            back = b"".join(_through(port, byte) for byte in TEXT.encode())
            took = (time.monotonic() - started) / len(back) * 1e6
            watch.say(f"  port {number}: sent {TEXT!r}, came back {back.decode(errors='replace')!r}, {took:.0f} us per byte")
            _check(back == TEXT.encode())


def _set_up(port: RegionClient) -> None:
    """Reset and enable the fifos, 8 data bits, DTR and RTS: registers 2 to 4 of a 16550."""
    for register, value in ((2, 0x07), (3, 0x03), (4, 0x03)):
        port.write_int(register, 1, value)


def _through(port: RegionClient, byte: int) -> bytes:
    """Send a byte and wait for what comes back: bit 0 of the line status (register 5) says when, register 0 holds it."""
    port.write_int(0, 1, byte)
    deadline = time.monotonic() + _WAIT
    while not port.read_int(5, 1) & 0x01:
        _check(time.monotonic() < deadline)
    return port.read(0, 1)


def _check(came_back: bool) -> None:
    if not came_back:
        raise DemoError("what came back is not what was sent")


def _run() -> None:
    watch = Stopwatch()
    with Device("mtty-2") as device:
        watch.say(f"`mdevkit run mtty-2` serves device {device.facts['uuid']}, a serial card with two ports")
        try:
            kit = find_kit()
        except MissingKitError as missing:
            sys.stdout.write(_INSTEAD.format(missing=missing))
            by_client(device, watch)
        else:
            in_guest(kit, device, watch)
    watch.say("done, and nothing of it is left")


def main() -> int:
    """Run the demo; 1 with the reason on stderr if it fails."""
    try:
        _run()
    except (DemoError, DeviceError, GuestError, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
