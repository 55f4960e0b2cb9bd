"""A serial card of the service whose host, or the service itself, is killed while somebody uses the card.

How long a client has been held up is what its front says in the host's log: from the death of the process to the first request
that the next one has answered, so the time in which the client wants nothing is part of it.
"""

from __future__ import annotations

import re
import statistics
import sys
import threading
from collections.abc import Sequence

from mdevkit.client import Client
from mdevkit.errors import MdevError

from tests.services import Running, wait_until

#: The plugins a service needs for it.
PLUGINS = "mdevkit-mtty,mdevkit-vfio"
#: Seconds after which a front answers for a process that does not come back; QEMU gives up after 5.
PATIENCE = 4.5


class Survivor:
    """A card of type `type_id` in the service `running`."""

    def __init__(self, running: Running, type_id: str = "mtty-1", **wish: object) -> None:
        self.running = running
        with running.client() as client:
            self.device = client.post("/v1/devices", {"type": type_id, **wish})
        self.uuid: str = self.device["uuid"]
        self.socket: str = self.device["endpoint"]["socket"]

    @property
    def arguments(self) -> Sequence[str]:
        """What to start QEMU with."""
        return list(self.device["attach"]["qemu"])

    def attribute(self, name: str) -> str:
        """Return the text of an attribute; asks again when the host dies meanwhile."""
        path = f"/v1/devices/{self.uuid}/attributes/{name}"

        def ask() -> str | None:
            try:
                with Client(self.running.socket, start=False) as client:
                    return str(client.get(path)["value"])
            except MdevError:
                return None

        value = wait_until(ask, what=f"an answer about {name}")
        assert isinstance(value, str)
        return value

    def kill(self) -> None:
        """Kill its host, as soon as there is one."""
        wait_until(lambda: "mtty" in self.running.hosts(), what="a host")
        self.running.kill_host("mtty")

    def kill_while_it_sends(self, size: int, times: int, stop: threading.Event) -> int:
        """Kill the host so many times, evenly spread over `size` bytes the guest sends; return how often, fewer only on `stop`."""
        for number in range(times):
            goal = size * (number + 1) // (times + 1)
            while int(self.attribute("port0_tx")) < goal:
                if stop.wait(0.01):
                    return number
            self.kill()
        return times

    @property
    def log(self) -> str:
        """What its hosts and fronts have said."""
        return (self.running.runtime / "hosts" / "mtty.log").read_text()

    @property
    def pauses(self) -> list[float]:
        """Seconds each death has held its client up, in ascending order."""
        return sorted(float(text) / 1e3 for text in re.findall(r"goes on after ([\d.]+) ms", self.log))

    @property
    def deaths(self) -> int:
        """How often its process has died under a client."""
        return self.log.count("its process has died")

    def report(self) -> None:
        """Print the pauses."""
        pauses = self.pauses or [0.0]
        facts = (pauses[0] * 1e3, statistics.median(pauses) * 1e3, pauses[-1] * 1e3)
        sys.stdout.write(f"{len(self.pauses)} pauses: min {facts[0]:.1f}, median {facts[1]:.1f}, max {facts[2]:.1f} ms\n")
