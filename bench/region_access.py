"""How long a 4-byte register read takes, compared with the least any server behind a socket could take.

A C client reads a register of a PCI device that `VfioUserServer` serves in a process of its own, and then asks a C program
that only sends something back, with messages of the same sizes over the same kind of socket. The two alternate, in an
order that is reversed each round. The goal is a median of 1.6 times the echo's or less.

    python bench/region_access.py [--rounds N] [--reads N]

Exits with 1 if the goal is missed. Pin nothing, but leave the machine alone while it runs: a round of an idle machine with
two processors varies by a few percent.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdevkit_vfio.pci import Bar, PciDevice, PciIds
from mdevkit_vfio.server import VfioUserServer

SOURCES = Path(__file__).parent / "region_access"
GOAL = 1.6
WARMUP = 500


class Register(PciDevice):
    """A PCI function with one register."""

    def __init__(self) -> None:
        super().__init__(PciIds(0x1234, 0x0001, 0x1234, 0x0001, 0x058000, 0), {0: Bar(4096)}, interrupt_pin=1)
        self.value = 0x12345678

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return self.value if not offset and not bar and size == 4 else 0


def serve(path: Path) -> None:
    """Serve the device until standard input ends."""
    server = VfioUserServer(Register(), path, "register")
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.close()


def compile_c(folder: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        sys.exit("a C compiler is needed: install gcc")
    for name in ("client", "echo"):
        command = [compiler, "-O2", "-Wall", "-Wextra", "-o", folder / name, SOURCES / f"{name}.c"]
        subprocess.run(command, check=True)


@contextlib.contextmanager
def running(*command: str | Path) -> Iterator[None]:
    """Run a server that says when it is ready; end it."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                sys.exit(f"{command[0]} does not start")
            yield
        finally:
            process.stdin.close()
            process.terminate()


@dataclass
class Round:
    """The percentiles of one round, in microseconds."""

    p50: float
    p99: float


def measure(client: Path, socket: Path, reads: int) -> Round:
    output = subprocess.run([client, socket, "0", str(WARMUP), str(reads)], stdout=subprocess.PIPE, check=True).stdout
    latencies = sorted(array.array("I", output))
    return Round(latencies[len(latencies) // 2] / 1000, latencies[len(latencies) * 99 // 100] / 1000)


def report(name: str, rounds: list[Round]) -> None:
    p50 = [one.p50 for one in rounds]
    p99 = statistics.median(one.p99 for one in rounds)
    print(f"{name:8} p50 {statistics.median(p50):7.2f} us  p99 {p99:7.2f} us  p50 of the rounds {min(p50):.2f} to {max(p50):.2f}")


def run(rounds: int, reads: int) -> float:
    """Return how many times the echo's median ours is: the median of the rounds' ratios."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        compile_c(folder)
        ours, echo = folder / "ours.sock", folder / "echo.sock"
        found: dict[Path, list[Round]] = {ours: [], echo: []}
        with running(sys.executable, __file__, "--serve", ours), running(folder / "echo", echo):
            for number in range(rounds):
                for socket in (ours, echo) if number % 2 else (echo, ours):
                    found[socket].append(measure(folder / "client", socket, reads))
    report("mdevkit", found[ours])
    report("echo", found[echo])
    return statistics.median(a.p50 / b.p50 for a, b in zip(found[ours], found[echo], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of both (default: %(default)s)")
    parser.add_argument("--reads", type=int, default=20000, help="reads per round (default: %(default)s)")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    ratio = run(arguments.rounds, arguments.reads)
    print(f"ratio    p50 {ratio:.2f} times the echo, {GOAL} is the goal: {'reached' if ratio <= GOAL else 'MISSED'}")
    sys.exit(ratio > GOAL)


if __name__ == "__main__":
    main()
