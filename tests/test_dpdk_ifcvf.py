"""dpdk-testpmd on a function of the simulated IFC VF card, through the parent driver and vhost_mdev: every frame accounted for.

What the client starts with goes round for ever: kicks reach the function by its doorbells, frames loop in the card. What it has
sent and not got back is exactly what it started with, unless one was lost or came twice.
"""

from __future__ import annotations

import os
import re
import time

import pytest
from mdevkit import Registry
from mdevkit_ifcvf_sim.parent import functions
from mdevkit_virtio.bus import VirtioMdev, VirtioMdevBus
from mdevkit_virtio.engine import VARIABLE, load
from mdevkit_virtio.vhost.driver import VhostMdevDriver

from tests.dpdk import PATIENCE, Traffic

pytestmark = pytest.mark.alone

TX = 1
#: `start tx_first 3` sends so many bursts of 32 frames.
BURSTS = 3
IN_FLIGHT = BURSTS * 32
#: Frames that have to go round: laps of the ring, and with the C engine of its 16-bit indexes.
ENOUGH = {"c": 300_000, "python": 10_000}


@pytest.fixture(params=["python"] if os.environ.get(VARIABLE) == "python" else ["c", "python"])
def engine(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return load().name


@pytest.fixture
def registry(engine):
    with Registry([*functions({"MDEVKIT_IFCVF_FUNCTIONS": "1"}), VirtioMdevBus(), VhostMdevDriver()]) as registry:
        yield registry


@pytest.fixture
def device(registry, tmp_path):
    return registry.create("ifcvf-vhost_mdev", endpoint_path=str(tmp_path / "vhost.sock"))


@pytest.fixture
def client(device, tmp_path):
    client = Traffic(tmp_path, tmp_path / "vhost.sock")
    try:
        client.until("testpmd>")
        yield client
    finally:
        client.close()


def stats(client):
    """What the client has received, sent, and failed to send."""
    said = client.say("show port stats 0", r"RX-packets: \d+[^#]*TX-errors: \d+")[0]
    return [int(re.search(rf"{what}: (\d+)", said)[1]) for what in ("RX-packets", "TX-packets", "TX-errors")]


def wait_received(client, count):
    deadline = time.monotonic() + PATIENCE
    while stats(client)[0] < count:
        assert time.monotonic() < deadline, client.output
        time.sleep(0.1)  # the client says nothing of its own accord


@pytest.mark.timeout(3 * PATIENCE)
def test_every_frame_comes_back(registry, device, client, engine):
    client.say(f"start tx_first {BURSTS}", "testpmd>")
    wait_received(client, ENOUGH[engine])
    # All of it stops and goes on, in the middle of the traffic.
    registry.suspend(device.uuid)
    before = stats(client)
    time.sleep(0.2)  # what is shown is that nothing comes
    assert stats(client)[0] - before[0] <= IN_FLIGHT
    registry.resume(device.uuid)
    wait_received(client, before[0] + ENOUGH[engine] // 10)
    client.say("stop", "Done.")
    received, sent, failed = stats(client)
    assert (sent - received, failed) == (IN_FLIGHT, 0)
    # The block of BAR 4 has counted with it: where the transmit ring stands is how many frames were sent.
    assert VirtioMdev.from_device(device).get_ops().get_vq_state(TX) == sent & 0xFFFF
    client.say("quit", "Bye")
