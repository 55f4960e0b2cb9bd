"""How fast a guest fills a display, and how long a screenshot takes: mbochs-large against QEMU's own bochs-display.

    python bench/display.py [--rounds N]

One guest has both cards, 2560x1600 each, and the kernel's bochs-drm on both. It writes pictures to either framebuffer in turn,
and each time a screenshot is taken: of ours with `mdevkit.screen` (the pixels) and as a PNG, of QEMU's with QMP's
``screendump``, as PPM and as PNG. What is written goes to the framebuffer's shadow buffer, and from there a worker of the
kernel's takes it to the card meanwhile, as for any program that draws on /dev/fb0. Both should be alike: ours is memory that
the guest has mapped, too. Run it from an environment made by `./dev setup`, after `./dev guests`, on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mdevkit import Registry
from mdevkit.cli.run import describe
from mdevkit.cli.screenshot import image
from mdevkit.screen import Screen

from tests.guests import Guest, find_kit

WIDTH, HEIGHT = 2560, 1600
SIZE = WIDTH * HEIGHT * 4
#: QEMU's card with as much memory as ours, and a monitor of the same size.
PEER = f'{{"driver":"bochs-display","id":"peer","vgamem":{64 << 20},"xres":{WIDTH},"yres":{HEIGHT}}}'
FILL, PIXELS, PNG = "fill through /dev/fb0", "screenshot: pixels (PPM)", "screenshot: PNG"
NO_CONSOLE = "for v in /sys/class/vtconsole/*; do echo 0 > $v/bind; done; true"


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def fill_seconds(guest: Guest, name: str) -> float:
    """Return how long the guest takes to write a picture, as it measures it itself."""
    fill = f"for i in 1 2 3 4 5 6 7 8; do cat /picture > /dev/{name}; done"
    start, end = guest.run(f"cut -d' ' -f1 /proc/uptime; {fill}; cut -d' ' -f1 /proc/uptime", timeout=120).split()
    return (float(end) - float(start)) / 8


def report(name: str, ours: list[float], peer: list[float]) -> None:
    mine, other = statistics.median(ours), statistics.median(peer)
    spread = f"{min(ours) * 1000:.0f} to {max(ours) * 1000:.0f} and {min(peer) * 1000:.0f} to {max(peer) * 1000:.0f}"
    print(f"{name:32} {mine * 1000:8.1f} ms   QEMU {other * 1000:8.1f} ms   ratio {mine / other:5.2f}   ({spread})")


def framebuffers(guest: Guest) -> tuple[str, str]:
    """Return the names of our framebuffer and of QEMU's."""
    names = guest.wait("ls /sys/class/graphics/fb1 >/dev/null && cd /sys/class/graphics && echo fb?").split()
    revision = {name: guest.run(f"cat /sys/class/graphics/{name}/device/revision").strip() for name in names}
    ours = next(name for name in names if revision[name] == "0x01")  # QEMU's is revision 2
    return ours, next(name for name in names if name != ours)


def measure(guest: Guest, screen: Screen, folder: Path, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    ours, peer = framebuffers(guest)
    guest.run(NO_CONSOLE)
    for name in (ours, peer):
        guest.run(f"echo 0 > /sys/class/graphics/{name}/blank; cat /picture > /dev/{name}")
    found: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in (FILL, PIXELS, PNG)}

    def dump(kind: str) -> float:
        return timed(lambda: guest.qmp.execute("screendump", 60, filename=str(folder / f"peer.{kind}"), device="peer", format=kind))

    for number in range(rounds):
        order = [(ours, 0), (peer, 1)]
        for name, column in order if number % 2 else reversed(order):
            found[FILL][column].append(fill_seconds(guest, name))
        found[PIXELS][0].append(timed(screen.look))
        found[PIXELS][1].append(dump("ppm"))
        found[PNG][0].append(timed(lambda: image(screen.look()).save(folder / "ours.png")))
        found[PNG][1].append(dump("png"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: %(default)s)")
    rounds = parser.parse_args().rounds
    picture = os.urandom(4096) * (SIZE // 4096)
    with tempfile.TemporaryDirectory() as folder, Registry.discover() as registry:
        os.environ["XDG_RUNTIME_DIR"] = folder
        mdev = registry.create("mbochs-large", params={"resolution": f"{WIDTH}x{HEIGHT}"})
        devices = [*describe(mdev)["attach"]["qemu"], "-device", PEER]
        with (
            Guest(find_kit(), devices, modules=["bochs"], files={"picture": picture}) as guest,
            Screen(mdev.get_attribute("screen_path")) as screen,
        ):
            found = measure(guest, screen, Path(folder), rounds)
            seen = screen.look()
        assert seen.frame.width == WIDTH, seen.frame
    fill = statistics.median(found[FILL][0])
    print(f"{WIDTH}x{HEIGHT}, {SIZE >> 20} MiB; the guest fills at {SIZE / fill / 1e6:.0f} MB/s\n")
    for what, (ours, peer) in found.items():
        report(what, ours, peer)


if __name__ == "__main__":
    main()
