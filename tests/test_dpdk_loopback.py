"""dpdk-testpmd under load through mvnet_loopback-vhost: two queue pairs, small rings, and at the end every frame accounted for.

The client forwards what it receives, so the frames it starts with go round for ever: what it has sent and not got back is
exactly those, unless one was lost or came twice. Our counters and the client's have to agree too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import pytest
from mdevkit import Registry
from mdevkit_mvnet.parent import MvnetParent
from mdevkit_virtio.bus import VirtioMdevBus
from mdevkit_virtio.engine import VARIABLE, load
from mdevkit_virtio.vhost.driver import VhostMdevDriver

PAIRS = 2
DESCRIPTORS = 256
#: `start tx_first 3` sends so many bursts of 32 frames on each queue.
BURSTS = 3
IN_FLIGHT = PAIRS * BURSTS * 32
#: Frames that have to go round: laps of the rings, and of the 16-bit indexes of a split one.
ENOUGH = {"c": 1_000_000, "python": 70_000}
PATIENCE = 60


class Traffic:
    """The traffic client; its output is a file, so stdbuf makes it appear line by line."""

    def __init__(self, folder, socket, *, packed, mergeable):
        vdev = (
            f"net_virtio_user0,mac=02:00:00:00:00:01,path={socket},queues={PAIRS},queue_size={DESCRIPTORS},"
            f"packed_vq={int(packed)},mrg_rxbuf={int(mergeable)}"
        )
        lcores = "0@0,1@0" if os.cpu_count() == 1 else "0@1,1@1"
        options = [
            *("stdbuf", "-oL", "dpdk-testpmd", "--lcores", lcores, "--no-huge", "-m", "256", "--no-pci", "--no-telemetry"),
            *(
                f"--file-prefix=test{os.getpid()}",
                "--log-level=*:4",
                "--vdev",
                vdev,
                "--",
                "-i",
                "--nb-cores=1",
                "--forward-mode=io",
            ),
            *(f"--rxd={DESCRIPTORS}", f"--txd={DESCRIPTORS}", f"--rxq={PAIRS}", f"--txq={PAIRS}"),
            *("--txpkts=200", "--total-num-mbufs=8192"),
        ]
        self._path = folder / "testpmd.out"
        with self._path.open("wb") as output:
            self._process = subprocess.Popen(options, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self):
        return self._path.read_text(errors="replace")

    def say(self, line, answer, count=1):
        """Type a line and wait for the answer, `count` times; return the matches."""
        before = len(self.output)
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self.until(answer, before, count)

    def until(self, answer, start=0, count=1):
        deadline = time.monotonic() + PATIENCE
        while len(found := re.findall(answer, self.output[start:])) < count:
            assert self._process.poll() is None, f"it has ended:\n{self.output}"
            assert time.monotonic() < deadline, f"no {answer!r} in:\n{self.output}"
            time.sleep(0.01)  # it writes a file
        return found

    def close(self):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._process.stdin.close()


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
    if shutil.which("dpdk-testpmd") is None:
        pytest.skip("no dpdk-testpmd: apt-get install dpdk-dev")
    started = []

    def start(**options):
        started.append(Traffic(tmp_path, tmp_path / "vhost.sock", **options))
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
