"""The testpmds that tests run: Debian 12's DPDK 22.11 where it is installed, and the 24.11 of the Debian root.

`Traffic` is one that keeps frames going round.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import pytest

from tests.guests.root import DPDK, find_root, loader

VERSIONS = ("22.11", "24.11")

#: Descriptors of a ring: a small one, so that it comes round often.
DESCRIPTORS = 256
#: How long a test waits for the client, in seconds.
PATIENCE = 60


def testpmd(version: str) -> list[str]:
    """Return the command line of a testpmd, up to EAL's options; skips with the command that gets it."""
    if version == "22.11":
        installed = shutil.which("dpdk-testpmd")
        if installed is None:
            pytest.skip("no dpdk-testpmd: apt-get install -y --no-install-recommends dpdk dpdk-dev")
        return [installed]
    root = find_root(DPDK)
    if root is None:
        pytest.skip("no DPDK 24.11: ./dev guests")
    # Its drivers are loaded from a folder that is compiled in, and is another one here.
    drivers = next((root / "usr/lib/x86_64-linux-gnu/dpdk").glob("pmds-*"))
    wanted = [f"-d{drivers}/librte_{name}.so" for name in ("bus_vdev", "mempool_ring", "net_virtio", "net_vhost")]
    return [*loader(root, "dpdk-testpmd"), str(root / "usr/bin/dpdk-testpmd"), *wanted]


class Traffic:
    """A testpmd that forwards what it receives; its output is a file, so stdbuf makes it appear line by line."""

    def __init__(self, folder, socket, *, pairs=1, packed=False, mergeable=False):
        vdev = (
            f"net_virtio_user0,mac=02:00:00:00:00:01,path={socket},queues={pairs},queue_size={DESCRIPTORS},"
            f"packed_vq={int(packed)},mrg_rxbuf={int(mergeable)}"
        )
        lcores = "0@0,1@0" if os.cpu_count() == 1 else "0@1,1@1"
        options = [
            *("stdbuf", "-oL", *testpmd("22.11")),
            *("--lcores", lcores, "--no-huge", "-m", "256", "--no-pci", "--no-telemetry"),
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
            *(f"--rxd={DESCRIPTORS}", f"--txd={DESCRIPTORS}", f"--rxq={pairs}", f"--txq={pairs}"),
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
