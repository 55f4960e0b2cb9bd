"""A guest on a network card that the service keeps: its host is killed, the service starts another, and traffic resumes."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

import pytest

from tests.guests.network import Card, arguments, boot
from tests.services import Running

UUID = "5d7d1b1e-4d5f-4c3c-9a52-3e0f4ad7c0de"


@dataclass
class Kept:
    """The device, by the command line."""

    machine: Running

    def say(self, *words):
        """What a command prints that goes well."""
        done = self.machine.mdevkit(*words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def attach(self):
        return shlex.split(self.say("attach", UUID, "--qemu"))

    def attributes(self):
        return json.loads(self.say("show", UUID, "--json"))["attributes"]


@pytest.fixture
def kept(tmp_path_factory, tmp_path):
    """A defined and started device, and at the end nothing of service, hosts and files."""
    # pytest's own folders are too deep for a socket's path.
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    machine = Running(folder, tmp_path)
    machine.environment["MDEVKIT_PLUGINS"] = "mdevkit-mvnet,mdevkit-virtio"
    del machine.environment["PYTHONPATH"]
    kept = Kept(machine)
    kept.say("define", "--uuid", UUID, "--parent", "mvnet_loopback", "--type", "mvnet_loopback-vhost")
    kept.say("start", "--uuid", UUID)
    yield kept
    stopped = machine.mdevkit("service", "stop", "--remove", "--force")
    hosts = machine.hosts()
    machine.clean_up()
    assert (stopped.returncode, hosts) == (0, {}), stopped.stderr


def test_traffic_resumes_after_the_host_was_killed(kit, kept):
    with boot(kit, arguments({"card": kept})) as guest:
        card = Card(guest)
        card.bring_up()
        card.generate_on(200)
        card.wait_traffic()
        before = card.carrier_losses()
        kept.machine.kill_host("mvnet_loopback")
        card.wait_carrier_lost(before)
        card.wait_traffic()
        card.stop()
        card.exchange(1500)
        before = int(kept.attributes()["rx_packets"])
        counted = card.generate(60, 10_000)
        assert (counted.sent, counted.received) == (10_000, 10_000)
        shown = kept.attributes()
        assert (int(shown["rx_packets"]) - before, shown["tx_dropped"]) == (10_000, "0")
