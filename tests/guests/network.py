"""What tests do with the network cards of a guest: the kernel's pktgen, counters, and frames compared byte for byte.

The cards loop: what a guest sends comes back to it. For the guest's thread; `boot` starts one that has what is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from tests.guests.guest import Guest
from tests.guests.kit import Kit

MODULES = ("virtio_net", "pktgen")
FILES = {"frames.py": Path(__file__).with_name("frames.py").read_bytes()}

#: Nobody's address: the guest's own network stack has nothing to do with such frames.
_NOBODY = "02:00:00:00:00:99"

_PKTGEN = "/proc/net/pktgen"


@dataclass(frozen=True)
class Counters:
    """What the card's driver has counted, since the guest booted."""

    sent: int
    received: int

    def __sub__(self, before: Counters) -> Counters:
        return Counters(self.sent - before.sent, self.received - before.received)


class Attachable(Protocol):
    """A running device."""

    def attach(self) -> Sequence[str]:
        """Return what ``mdevkit attach`` prints for QEMU."""


def arguments(devices: Mapping[str, Attachable], options: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Return QEMU's arguments for a guest with these devices, as ``mdevkit attach`` prints them.

    What it prints for each of them, the shared memory, is taken once. `options` are added to a device's ``-device``, by its key.
    """
    words: dict[tuple[str, str], None] = {}
    for key, device in devices.items():
        printed = device.attach()
        for option, value in zip(printed[::2], printed[1::2], strict=True):
            extra = options.get(key, "") if option == "-device" else ""
            words[option, f"{value},{extra}" if extra else value] = None
    return [word for pair in words for word in pair]


def boot(kit: Kit, words: Sequence[str], *, cpus: int = 1, incoming: bool = False) -> Guest:
    """Boot a guest with what tests of its network need; `words` are QEMU's arguments for the devices and the memory."""
    return Guest(kit, words, shared_memory=False, modules=MODULES, files=FILES, python=True, cpus=cpus, incoming=incoming)


class Card:
    """One network card of a guest, by its name there, with `queues` queue pairs."""

    def __init__(self, guest: Guest, name: str = "eth0", queues: int = 1) -> None:
        self._guest = guest
        self.name = name
        self._queues = queues

    def bring_up(self) -> None:
        """Make it work, without IPv6, whose frames would count; needed again after a reboot."""
        self._guest.run(
            f"echo 1 >/proc/sys/net/ipv6/conf/{self.name}/disable_ipv6 && ip link set {self.name} up"
            f" && until [ $(cat /sys/class/net/{self.name}/carrier) = 1 ]; do usleep 10000; done"
        )

    def carrier(self) -> bool:
        """Return whether the link is up."""
        return self._guest.run(f"cat /sys/class/net/{self.name}/carrier") == "1\n"

    def carrier_losses(self) -> int:
        """Return how often the link has gone down."""
        return int(self._guest.run(f"cat /sys/class/net/{self.name}/carrier_down_count"))

    def wait_carrier_lost(self, before: int, timeout: float = 10) -> None:
        """Wait until the link has gone down more often than `before`."""
        self._guest.wait(f"test $(cat /sys/class/net/{self.name}/carrier_down_count) -gt {before}", timeout)

    def counters(self) -> Counters:
        """Return what the driver has counted."""
        sent, received = self._guest.run(f"cd /sys/class/net/{self.name}/statistics && cat tx_packets rx_packets").split()
        return Counters(int(sent), int(received))

    def wait_received(self, before: Counters, count: int, timeout: float = 10) -> None:
        """Wait until `count` frames have come since `before`."""
        total = before.received + count
        self._guest.wait(f"test $(cat /sys/class/net/{self.name}/statistics/rx_packets) -ge {total}", timeout)

    def exchange(self, size: int, count: int = 200) -> None:
        """Send frames of random bytes and compare what comes back; CommandFailedError if one is wrong or missing."""
        self._guest.run(f"python3 /frames.py exchange {self.name} {size} {count}", timeout=60)

    def generate(self, size: int, count: int, *, watched: int = 0, timeout: float = 120) -> Counters:
        """Let pktgen send `count` frames through each queue, wait until as many are back, and return what was counted.

        `size` is in bytes, without the check sum of Ethernet. The contents of the first `watched` are checked.
        """
        self._configure(size, count)
        before = self.counters()
        watch = f"python3 /frames.py watch {self.name} {size} {watched}" if watched else "echo watching"
        self._guest.run(f"({watch}; echo $? >/watch.status) >/watch 2>&1 & until grep -q watching /watch; do usleep 10000; done")
        self._guest.run(f"echo start >{_PKTGEN}/pgctrl", timeout)
        assert self._sent() == count * self._queues
        self.wait_received(before, count * self._queues)
        self._guest.wait("test -s /watch.status", timeout=30)
        assert self._guest.run("cat /watch /watch.status") == "watching\n0\n"
        return self.counters() - before

    def generate_on(self, size: int, delay: int = 400_000) -> None:
        """Let pktgen send frames, one in `delay` nanoseconds at most, until `stop`: again whenever it ends.

        It ends for good when the link goes down, so it is started again and again.
        """
        self._configure(size, 0, delay)
        self._guest.run(f"(while sleep 0.1; do echo start >{_PKTGEN}/pgctrl; done) >/dev/null 2>&1 & echo $! >/generator")

    def stop(self) -> None:
        """End what `generate_on` began."""
        self._guest.run(f"kill $(cat /generator); echo stop >{_PKTGEN}/pgctrl")

    def wait_traffic(self, count: int = 100, timeout: float = 20) -> None:
        """Wait until `count` more frames have come back."""
        self.wait_received(self.counters(), count, timeout)

    def _configure(self, size: int, count: int, delay: int = 0) -> None:
        """Give pktgen this card alone, a thread for each queue."""
        self._guest.run(f"for thread in {_PKTGEN}/kpktgend_*; do echo rem_device_all >$thread; done")
        for queue in range(self._queues):
            name = f"{self.name}@{queue}"
            settings = (f"count {count}", f"pkt_size {size}", f"delay {delay}", f"dst_mac {_NOBODY}", "dst 192.0.2.2")
            map_queue = (f"queue_map_min {queue}", f"queue_map_max {queue}")
            commands = [f"echo add_device {name} >{_PKTGEN}/kpktgend_{queue}"]
            commands += [f"echo {setting} >{_PKTGEN}/{name}" for setting in (*settings, *map_queue)]
            self._guest.run(" && ".join(commands))

    def _sent(self) -> int:
        """How many frames pktgen has sent, as it says itself; failed ones fail the test."""
        said = self._guest.run(f"cat {_PKTGEN}/{self.name}@*")
        sent = re.findall(r"pkts-sofar: (\d+)  errors: (\d+)", said)
        assert [failed for _, failed in sent] == ["0"] * self._queues, said
        return sum(int(good) for good, _ in sent)
