"""dpdk-testpmd under load through mvnet_loopback-vhost: two queue pairs, small rings, and at the end every frame accounted for.

The client forwards what it receives, so the frames it starts with go round for ever: what it has sent and not got back is
exactly those, unless one was lost or came twice. Our counters and the client's have to agree too.
"""

from __future__ import annotations

import os
import time

import pytest
from mdevkit import Registry
from mdevkit_mvnet.parent import MvnetParent
from mdevkit_virtio.bus import VirtioMdevBus
from mdevkit_virtio.engine import VARIABLE, load
from mdevkit_virtio.vhost.driver import VhostMdevDriver

from tests.dpdk import PATIENCE, Traffic

pytestmark = pytest.mark.alone

PAIRS = 2
#: `start tx_first 3` sends so many bursts of 32 frames on each queue.
BURSTS = 3
IN_FLIGHT = PAIRS * BURSTS * 32
#: Frames that have to go round: laps of the rings, and of the 16-bit indexes of a split one.
ENOUGH = {"c": 1_000_000, "python": 70_000}


@pytest.fixture(params=["python"] if os.environ.get(VARIABLE) == "python" else ["c", "python"])
def engine(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return load().name


@pytest.fixture
def device(engine, tmp_path):
    with Registry([MvnetParent(), VirtioMdevBus(), VhostMdevDriver()]) as registry:
        yield registry.create("mvnet_loopback-vhost", params={"queues": PAIRS}, endpoint_path=str(tmp_path / "vhost.sock"))


@pytest.fixture
def testpmd(device, tmp_path):
    started = []

    def start(**options):
        started.append(Traffic(tmp_path, tmp_path / "vhost.sock", pairs=PAIRS, **options))
        started[-1].until("testpmd>")
        return started[-1]

    yield start
    for process in started:
        process.close()


def total(device, name):
    return sum(device.drvdata.statistic(name))


@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize("mergeable", [False, True], ids=["plain", "mergeable"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_frame_is_accounted_for(testpmd, device, engine, packed, mergeable):
    client = testpmd(packed=packed, mergeable=mergeable)
    client.say(f"start tx_first {BURSTS}", "testpmd>")
    deadline = time.monotonic() + PATIENCE
    while total(device, "rx_packets") < ENOUGH[engine]:
        assert time.monotonic() < deadline, f"{total(device, 'rx_packets')} frames"
        time.sleep(0.05)  # the client says nothing of its own accord
    # Per queue, then for all: received, dropped and so on, sent.
    client.say("stop", "Done.")
    patterns = (r"RX-packets: (\d+)", r"TX-packets: (\d+)", r"TX-errors: (\d+)")
    received, sent, dropped = (int(client.say("show port stats 0", pattern)[0]) for pattern in patterns)
    assert (sent - received, dropped) == (IN_FLIGHT, 0)
    # What the client did not receive any more waits in its rings: all of it has been taken and given.
    while total(device, "rx_packets") < sent:
        assert time.monotonic() < deadline, "the device keeps frames"
        time.sleep(0.01)
    names = ("rx_packets", "tx_packets", "tx_dropped", "tx_errors")
    assert [total(device, name) for name in names] == [sent, sent, 0, 0]
    assert total(device, "rx_bytes") == 200 * sent
    assert all(count > ENOUGH[engine] // 100 for count in device.drvdata.statistic("rx_packets")), "a pair did nothing"
    client.say("quit", "Bye")


def test_it_is_the_engine_that_was_asked_for(device, engine):
    assert device.drvdata.engine.name == engine
