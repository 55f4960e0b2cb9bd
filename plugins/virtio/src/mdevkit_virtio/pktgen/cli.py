"""``mdevkit pktgen UUID``: traffic through a running virtio network device, in the service or in ``mdevkit run``.

The device must send frames back, as the mvnet loopback does. One thread, the main one.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
from typing import Annotated, Final

import typer
from mdevkit.cli.complete import devices_with
from mdevkit.cli.output import say, say_json
from mdevkit.errors import MdevError

from mdevkit_virtio.pktgen.frames import MIN_SIZE, FrameMaker, check_sizes
from mdevkit_virtio.pktgen.generator import Generator, Plan, Result
from mdevkit_virtio.pktgen.link import Link, open_link
from mdevkit_virtio.virtio.clients import NETDEV, VHOST_USER, Facts, find_device, in_use

_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)([kM]?)")
_FACTORS: Final = {"": 1.0, "k": 1e3, "M": 1e6}


def _rate(text: str) -> float:
    found = _RATE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no rate: frames per second are wanted, e.g. 500, 20k or 1.5M")
    return float(found[1]) * _FACTORS[found[2]]


def _sizes(text: str) -> list[int]:
    """Return the sizes, without looking at what the device can do."""
    words = text.split(",")
    if not all(re.fullmatch(r"\d{1,5}", word) for word in words):
        raise typer.BadParameter(f"{text!r} is no list of sizes: bytes are wanted, e.g. 60 or 60,1514")
    return [int(word) for word in words]


def command(
    uuid: Annotated[
        str,
        typer.Argument(
            metavar="UUID",
            autocompletion=devices_with(NETDEV, VHOST_USER),
            help="The device, or a unique beginning of its UUID.",
        ),
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=0, metavar="N", help="How many frames; 0 for no limit.")] = 10_000,
    seconds: Annotated[float, typer.Option("--time", "-t", min=0, metavar="SECONDS", help="How long; 0 for no limit.")] = 0.0,
    size: Annotated[str, typer.Option("--size", "-s", metavar="BYTES[,...]", help="Sizes of the frames, in turn.")] = str(MIN_SIZE),
    rate: Annotated[str, typer.Option("--rate", "-r", metavar="N[k|M]", help="Frames per second; 0 for all it can.")] = "0",
    window: Annotated[int, typer.Option("--window", "-w", min=1, metavar="N", help="Most frames in flight.")] = 256,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="How long a frame may take before it is lost.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send frames through a network device that sends them back, and tell what became of them.

    Exit code 1 if one was lost, damaged or came twice. Ctrl-C ends the sending early.
    """
    sizes, frames_per_second = _sizes(size), _rate(rate)
    if not all(map(math.isfinite, (seconds, timeout))):
        raise typer.BadParameter("times must be finite")
    facts = find_device(uuid)
    link = open_link(facts)
    try:
        check_sizes(sizes, link.max_frame)
        plan = Plan(count, seconds, frames_per_second, window, timeout)
        result = _run(link, FrameMaker(sizes, int.from_bytes(os.urandom(4), "big")), plan, facts, quiet=as_json)
    finally:
        link.close()
    say_json({"uuid": facts["uuid"], **result.facts()}) if as_json else _print(result)
    if not result.flawless:
        raise typer.Exit(1)


def _run(link: Link, maker: FrameMaker, plan: Plan, facts: Facts, *, quiet: bool) -> Result:
    progress = _Progress(sys.stderr.isatty() and not quiet)
    generator = Generator(link, maker, plan, progress)
    before = signal.signal(signal.SIGINT, lambda *_: generator.stop())
    try:
        return generator.run()
    except MdevError as error:
        if error.errno != errno.ECONNRESET:
            raise
        if generator.result.received:
            raise MdevError(errno.ENODEV, f"device {facts['uuid']} is gone: it hung up on us") from error
        raise in_use(facts) from error
    finally:
        signal.signal(signal.SIGINT, before)
        progress.end()


class _Progress:
    """One line on the terminal, written again and again."""

    def __init__(self, wanted: bool) -> None:
        self._wanted: Final = wanted
        self._width = 0

    def __call__(self, result: Result) -> None:
        if not self._wanted:
            return
        rate = result.received / result.seconds if result.seconds else 0.0
        line = (
            f"{result.seconds:6.1f} s  {result.sent} sent  {result.received} received  {result.lost} lost  {_short(rate)} frames/s"
        )
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def end(self) -> None:
        """Leave the line as it is and go to the next."""
        if self._width:
            sys.stderr.write("\n")


def _print(result: Result) -> None:
    facts = result.facts()
    say(f"sent      {result.sent} frames, {result.sent_bytes} bytes in {result.seconds:.3f} s")
    say(f"received  {result.received} frames, {_short(facts['rate'])} frames/s, {_short(facts['bits_per_second'])} bit/s")
    say(f"lost      {result.lost} ({facts['loss']:.3%})")
    others = {name: facts[name] for name in ("corrupt", "reordered", "late", "duplicate", "foreign") if facts[name]}
    if others:
        say(f"also      {', '.join(f'{value} {name}' for name, value in others.items())}")
    latencies = ", ".join(f"{name} {value:.1f}" for name, value in facts["latency_us"].items() if value is not None)
    none = f"no frame has returned{' in time' if result.late else ''}"
    say(f"latency   {latencies} us" if latencies else f"latency   {none}")


def _short(number: float) -> str:
    """Return a number with three digits and a unit."""
    power = max(0, min(3, (len(str(int(number))) - 1) // 3))
    return f"{number / 1000**power:.3g} {' kMG'[power]}".strip()
