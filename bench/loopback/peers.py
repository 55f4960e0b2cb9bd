"""The processes of the loopback benchmark: a traffic client, and the two backends that take turns at sending its frames back."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

#: Who runs where. Each process has a processor of its own; DPDK's main thread, which only waits, shares it with its worker.
BACKEND_CPU: Final = 0
CLIENT_CPU: Final = 1
DESCRIPTORS: Final = 1024
#: `start tx_first 32` sends 32 bursts of 32 frames, which go round from then on.
BURSTS: Final = 32
#: Seconds a process may take to start, to answer a command, to end.
PATIENCE: Final = 30.0
#: Seconds between two measurements. On a virtual machine with a balloon, Linux tells the host two seconds later what memory a
#: process has given back (mm/page_reporting.c, PAGE_REPORTING_DELAY), which takes the processors away for 50 ms: from the next
#: measurement, and more from the backend that starts faster.
REST: Final = 3.0

TESTPMD: Final = shutil.which("dpdk-testpmd") or "dpdk-testpmd"
MDEVKIT: Final = Path(sys.executable).with_name("mdevkit")


class Case(NamedTuple):
    """What is measured: the ring's format, and bytes of a frame."""

    packed: bool
    size: int

    def __str__(self) -> str:
        return f"{'packed' if self.packed else 'split'}, {self.size} bytes"


class Sample(NamedTuple):
    """Frames per second that came back, and the smaller share of its processor that backend or client got."""

    rate: float
    share: float


def _eal(cpu: int, prefix: str) -> list[str]:
    name = f"{prefix}{os.getpid()}"
    return [
        *(TESTPMD, "--lcores", f"0@{cpu},1@{cpu}", "--no-huge", "-m", "512", "--no-pci", "--no-telemetry"),
        *(f"--file-prefix={name}", "--log-level=*:4"),
    ]


def _io(descriptors: int, mbufs: int) -> list[str]:
    rings = [f"--rxd={descriptors}", f"--txd={descriptors}"]
    return ["--", "-i", "--nb-cores=1", "--forward-mode=io", *rings, f"--total-num-mbufs={mbufs}"]


def dpdk_backend(socket: Path) -> list[str]:
    """Return the command of DPDK's own vhost backend, which sends back what it gets."""
    vdev = f"net_vhost0,iface={socket},queues=1"
    return [*_eal(BACKEND_CPU, "backend"), "--vdev", vdev, *_io(DESCRIPTORS, 32768), "--auto-start", "--no-flush-rx"]


def our_backend(socket: Path) -> list[str]:
    """Return the command of our loopback."""
    run = [str(MDEVKIT), "run", "mvnet_loopback-vhost", "--socket", str(socket), "--set", "spin_us=1000000"]
    return ["taskset", "-c", str(BACKEND_CPU), *run]


def client(socket: Path, case: Case) -> list[str]:
    """Return the command of the traffic client; its output is a file, so stdbuf makes it appear line by line."""
    vdev = (
        f"net_virtio_user0,mac=02:00:00:00:00:01,path={socket},queues=1,queue_size={DESCRIPTORS},"
        f"packed_vq={int(case.packed)},mrg_rxbuf=1"
    )
    return ["stdbuf", "-oL", *_eal(CLIENT_CPU, "client"), "--vdev", vdev, *_io(DESCRIPTORS, 16384), f"--txpkts={case.size}"]


class Process:
    """A program whose output is kept in a file, and which ends with this context."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        self._name: Final = name
        self._output: Final = folder / f"{name}.out"
        with self._output.open("wb") as output:
            self._process: Final = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def say(self, line: str) -> int:
        """Type a line into it; return how long its output was before."""
        assert self._process.stdin is not None
        before = self._output.stat().st_size
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return before

    def read(self, pattern: str, start: int = 0) -> re.Match[str]:
        """Wait for a pattern in its output, behind byte `start`."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self._output.read_bytes()[start:].decode(errors="replace"))):
            self.check(deadline)
            time.sleep(0.01)  # somebody else writes the file
        return found

    def check(self, deadline: float) -> None:
        """End the benchmark with what the program printed, if it has ended or if it is too late."""
        if self._process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{self._name} does not go on:\n{self._output.read_text(errors='replace')[-2000:]}")

    def wait(self) -> None:
        """Wait for it to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its threads."""
        total = 0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total * 1e-9


@contextlib.contextmanager
def _running(backend: str, case: Case) -> Iterator[tuple[Process, Process]]:
    """Start a backend, then the client; yield both."""
    with tempfile.TemporaryDirectory(prefix="loopback-") as name:
        folder = Path(name)
        socket = folder / "vhost.sock"
        command = dpdk_backend(socket) if backend == "dpdk" else our_backend(socket)
        engine = {} if backend == "dpdk" else {"MDEVKIT_ENGINE": backend}
        with Process(backend, command, folder, engine) as server:
            deadline = time.monotonic() + PATIENCE
            while not socket.exists():
                server.check(deadline)
                time.sleep(0.01)  # it starts
            with Process("client", client(socket, case), folder) as traffic:
                yield server, traffic


def measure(backend: str, case: Case, seconds: float, warmup: float = 0.5) -> Sample:
    """Measure one of the backends `dpdk`, `c`, `python` (our engines), in fresh processes."""
    with _running(backend, case) as (server, traffic):
        traffic.read("testpmd>")
        traffic.say(f"start tx_first {BURSTS}")
        time.sleep(warmup)  # caches, clocks and batches settle
        processes = (server, traffic)
        traffic.read("RX-packets", traffic.say("show port stats 0"))
        before, began = [process.cpu_seconds for process in processes], time.monotonic()
        time.sleep(seconds)  # the measurement
        after, elapsed = [process.cpu_seconds for process in processes], time.monotonic() - began
        # Frames per second since the last statistics, by the client's own clock.
        rate = float(traffic.read(r"Rx-pps: +(\d+)", traffic.say("show port stats 0"))[1])
        traffic.say("stop")
        traffic.say("quit")
        traffic.wait()
    time.sleep(REST)  # what these processes have left behind
    return Sample(rate, min((b - a) / elapsed for a, b in zip(before, after, strict=True)))
