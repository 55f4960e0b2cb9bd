"""DPDK's virtio_user as the frontend: the real thing, with the arguments that `attach` prints."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import tempfile
import threading
import time

import pytest
from mdevkit_virtio.vhost.driver import VhostUserEndpoint
from mdevkit_virtio.vhost.sources import Connecting

from tests import dpdk

pytestmark = [pytest.mark.alone, pytest.mark.timeout(180)]

#: Seconds anything may take on a machine that has much else to do.
LIMIT = 30
#: What may come in the middle of anything, even of a prompt.
EVENT = re.compile(r"Port\d+:linkstatechangeevent")


def _plain(text):
    """What was said without white space, and without what another thread says in the middle of it, even of a word."""
    return EVENT.sub("", re.sub(r"\s+", "", text))


class Pmd:
    """One testpmd that sends back what it receives. It is asked over its standard input, and gives its answers in order."""

    def __init__(self, program, vdev, *, queues=1):
        self.output = ""
        self._heard = threading.Condition()
        # Its runtime files; DPDK looks nowhere else.
        self._folder = tempfile.TemporaryDirectory(prefix="mdk")
        # A terminal, because to a pipe it would tell its statistics when it ends.
        self._terminal, terminal = pty.openpty()
        self._process = subprocess.Popen(
            [*program, *self._options(vdev, queues)],
            stdin=subprocess.PIPE,
            stdout=terminal,
            stderr=terminal,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": self._folder.name, "RUNTIME_DIRECTORY": self._folder.name},
        )
        os.close(terminal)
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @staticmethod
    def _options(vdev, queues):
        cpu = max(os.sched_getaffinity(0))
        eal = ["--lcores", f"0@{cpu},1@{cpu}", "--no-huge", "-m", "128", "--no-pci", "--no-telemetry", *vdev]
        rings = [f"--rxq={queues}", f"--txq={queues}", "--rxd=256", "--txd=256", "--total-num-mbufs=8192"]
        return [*eal, "--", "-i", "--nb-cores=1", "--forward-mode=io", "--no-flush-rx", *rings]

    def _read(self):
        # The end of a terminal that nobody holds any more is EIO.
        with contextlib.suppress(OSError):
            while text := os.read(self._terminal, 4096).decode(errors="replace"):
                with self._heard:
                    self.output += text
                    self._heard.notify_all()

    def say(self, line, answer):
        """Give a command and return the answer, which ends with what the expression matches."""
        with self._heard:
            start = len(self.output)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.hear(answer, start)

    def hear(self, expression, start=0):
        """Wait until it has said something, without regard to white space."""
        with self._heard:
            heard = self._heard.wait_for(lambda: re.search(expression, _plain(self.output[start:])), LIMIT)
            assert heard, self.output
            return heard.group(0)

    def received(self):
        """Return how many frames have come in so far."""
        answer = self.say("show port stats all", r"RX-packets:\d+.*?TX-errors.*?#{20}")
        return int(re.search(r"RX-packets:(\d+)", answer).group(1))

    def ready(self):
        """Wait until the device is up."""
        self.hear(r"testpmd>")
        return self

    def traffic(self, more=20_000):
        """Wait until so many frames more have gone round."""
        goal = self.received() + more
        deadline = time.monotonic() + LIMIT
        while self.received() < goal:
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.05)

    def kill(self):
        """End it without a word to its backend; harmless when it has ended."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdin.close()
        os.close(self._terminal)
        self._folder.cleanup()

    def quit(self):
        """End it in order."""
        self.say("stop", r"testpmd>")
        self._process.stdin.write("quit\n")
        self._process.stdin.flush()
        assert self._process.wait(LIMIT) == 0
        self.kill()


@pytest.fixture(params=dpdk.VERSIONS)
def testpmd(request, later):
    """Starts testpmd with a device's arguments."""
    program_line = dpdk.testpmd(request.param)

    def start(served, more="", **options):
        *option, vdev = VhostUserEndpoint(served.server, "x").attach("dpdk")
        program = Pmd(program_line, [*option, vdev + more], **options)
        later(lambda: program.kill() if program._process.returncode is None else None)
        return program

    return start


@pytest.mark.parametrize("more", ["", ",packed_vq=1", ",in_order=0", ",mrg_rxbuf=0"], ids=["split", "packed", "any-order", "small"])
def test_frames_go_round(serve, testpmd, until, more):
    served = serve(num=1024)
    program = testpmd(served, more).ready()
    assert served.server.client.pid == program.pid
    program.say("start tx_first 2", r"testpmd>")
    program.traffic()
    program.quit()
    until(lambda: served.server.client is None)
    assert not served.refusals()


def test_two_pairs(serve, testpmd):
    served = serve(pairs=2, num=256)
    program = testpmd(served, queues=2).ready()
    program.say("start tx_first 2", r"testpmd>")
    program.traffic()
    assert all(served.ops.get_vq_ready(index) for index in range(4))
    program.quit()
    assert not served.refusals()


def test_a_client_that_is_killed_is_followed_by_another(serve, testpmd, until):
    served = serve()
    for _ in range(2):
        program = testpmd(served).ready()
        program.say("start tx_first 2", r"testpmd>")
        program.traffic()
        program.kill()
        until(lambda: served.server.client is None, LIMIT)


def test_a_port_is_stopped_and_started(serve, testpmd):
    served = serve()
    program = testpmd(served).ready()
    for _ in range(2):
        program.say("start tx_first 2", r"testpmd>")
        program.traffic()
        program.say("stop", r"testpmd>")
        program.say("port stop all", r"Done.*testpmd>")
        program.say("port start all", r"Done.*testpmd>")
    program.quit()
    assert not served.refusals()


@pytest.mark.parametrize("more", ["", ",packed_vq=1"], ids=["split", "packed"])
def test_a_backend_that_comes_back_is_used_again(serve, loopback, testpmd, tmp_path, until, more):
    """The frontend serves the socket. What was in flight in a split ring goes round again; of a packed one virtio_user drops it."""
    path = str(tmp_path / "frontend.sock")
    first = serve(loopback(name="first", num=256), Connecting(path))
    program = testpmd(first, more).ready()
    program.say("start tx_first 2", r"testpmd>")
    program.traffic()
    # No GET_VRING_BASE, no farewell: as if it had been killed.
    first.server.close()
    second = serve(loopback(name="second", num=256), Connecting(path))
    until(lambda: second.ops.get_vq_ready(0) and second.ops.get_vq_ready(1), LIMIT)
    if more:
        program.say("stop", r"testpmd>")
        program.say("start tx_first 2", r"testpmd>")
    program.traffic()
    program.quit()
    assert not second.refusals()
