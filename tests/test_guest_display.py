"""mbochs and mdpy in a stock Debian guest under QEMU: the kernel's own bochs-drm draws, and what we see is what it drew.

One guest has three mbochs with three monitors, and an mdpy. Pictures are compared pixel by pixel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mdevkit import Mdev, Registry
from mdevkit.cli.run import describe
from mdevkit.errors import MdevError
from mdevkit.running import announced
from mdevkit.screen import Screen
from mdevkit_vfio.proto import Command

from tests.guests import Guest, Kit
from tests.guests.root import loader

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow: pip install -r requirements-dev.txt")

#: Type and resolution of each mbochs.
MONITORS = {"mbochs-small": (800, 600), "mbochs-medium": (1024, 768), "mbochs-large": (1920, 1080)}
MODETEST = "usr/bin/modetest"
#: Where to put pictures for the manual; nowhere by default.
KEEP = os.environ.get("MDEVKIT_KEEP_PICTURES")
#: Takes the text console from the displays, cursor and all.
NO_CONSOLE = "for v in /sys/class/vtconsole/*; do echo 0 > $v/bind; done; true"
#: How long a picture may take to be what it should: fbdev copies what was written to /dev/fb0 a little later.
PATIENCE = 15.0


def _noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)  # no two rows are alike, so that any shift shows


PATTERNS = {width: _noise(width, width * height * 4) for width, height in MONITORS.values()}


class Counter:
    """Counts the accesses by message to each region."""

    def __init__(self) -> None:
        self.regions: dict[int, int] = {}

    def __call__(self, exchange: Any) -> None:
        if exchange.command in {Command.REGION_READ, Command.REGION_WRITE}:
            region = struct.unpack_from("<I", exchange.request, 8)[0]
            self.regions[region] = self.regions.get(region, 0) + 1
        elif exchange.command == Command.REGION_WRITE_MULTI:
            raise AssertionError("nothing is posted to a device that has mapped memory")


@dataclass
class Display:
    """A served display. `arguments` are QEMU's."""

    mdev: Mdev
    counter: Counter
    arguments: list[str]

    @property
    def uuid(self) -> str:
        return self.mdev.name


@contextlib.contextmanager
def serving(registry: Registry, type_id: str, **params: str) -> Iterator[Display]:
    """Create a device that the command line finds as if it ran by itself."""
    mdev = registry.create(type_id, params=params)
    facts = describe(mdev)
    counter = Counter()
    mdev.endpoint.server.observer = counter
    with announced(mdev.name, lambda: describe(mdev)):
        yield Display(mdev, counter, facts["attach"]["qemu"])


def screenshot(display: Display, folder: Path) -> Any:
    """Take one with the command, as a user would."""
    file = folder / "shot.png"
    command = [sys.executable, "-P", "-m", "mdevkit", "screenshot", display.uuid, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(file) as image:
        return image.convert("RGB")


def picture(size: tuple[int, int], xrgb: bytes) -> Any:
    """Return what `xrgb`, blue first, looks like."""
    return Image.frombytes("RGB", size, xrgb, "raw", "BGRX")


def wait_for_picture(display: Display, wanted: Any, folder: Path) -> None:
    """Wait until the screenshot is `wanted`; says how it differs."""
    deadline = time.monotonic() + PATIENCE
    while (found := screenshot(display, folder)).tobytes() != wanted.tobytes() or found.size != wanted.size:
        assert found.size == wanted.size or time.monotonic() < deadline, f"{found.size} are shown, not {wanted.size}"
        if time.monotonic() > deadline:
            pairs = zip(found.tobytes(), wanted.tobytes(), strict=True)
            wrong = [place // 3 for place, (one, other) in enumerate(pairs) if one != other]
            raise AssertionError(f"{len(set(wrong))} pixels differ, from number {wrong[0]} on")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with pytest.MonkeyPatch.context() as patch, Registry.discover() as registry:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        yield registry


@pytest.fixture(scope="module")
def displays(registry: Registry) -> Iterator[dict[str, Display]]:
    with contextlib.ExitStack() as stack:
        served = {}
        for type_id, (width, height) in MONITORS.items():
            params = {"resolution": f"{width}x{height}", "monitor": f"M {width}", "serial": str(width)}
            served[type_id] = stack.enter_context(serving(registry, type_id, **params))
        served["mdpy-vga"] = stack.enter_context(serving(registry, "mdpy-vga"))
        yield served


def _programs(kit: Kit) -> dict[str, bytes]:
    """Return modetest with what it needs, for the guest's initramfs; empty where the kit has none."""
    if kit.root is None or not (kit.root / MODETEST).exists():
        return {}
    command = [*loader(kit.root, "modetest"), "--list", str(kit.root / MODETEST)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    libraries = {f"lib/{Path(path).name}": Path(path).read_bytes() for path in re.findall(r"=> (/\S+)", listed)}
    start = (kit.root / "lib64/ld-linux-x86-64.so.2").read_bytes()
    return {"modetest": (kit.root / MODETEST).read_bytes(), "lib/ld.so": start, **libraries}


@pytest.fixture(scope="module")
def guest(kit: Kit, displays: dict[str, Display]) -> Iterator[Guest]:
    arguments = [word for display in displays.values() for word in display.arguments]
    files = {f"pattern-{width}": data for width, data in PATTERNS.items()}
    with Guest(kit, arguments, modules=["bochs"], files=files | _programs(kit)) as guest:
        if "modetest" in _programs(kit):
            guest.run("chmod +x /modetest /lib/ld.so")
        yield guest


@pytest.fixture(scope="module")
def framebuffers(guest: Guest) -> dict[int, str]:
    """The name of each framebuffer, by its width."""
    names = guest.wait("ls /sys/class/graphics/fb2 >/dev/null && cd /sys/class/graphics && echo fb?").split()
    return {int(guest.run(f"cat /sys/class/graphics/{name}/virtual_size").split(",")[0]): name for name in names}


def test_the_kernels_own_driver_binds(guest: Guest):
    assert guest.run("uname -v").startswith("#1 SMP PREEMPT_DYNAMIC Debian")
    drivers = guest.run("for d in /sys/bus/pci/devices/*; do echo $(cat $d/vendor $d/device) $(readlink $d/driver); done")
    assert drivers.count("0x1234 0x1111 ../../../bus/pci/drivers/bochs-drm") == 3, drivers


def test_modes_come_from_our_edid(guest: Guest, framebuffers: dict[int, str]):
    assert sorted(framebuffers) == [800, 1024, 1920]
    for width, height in MONITORS.values():
        name = framebuffers[width]
        assert guest.run(f"cat /sys/class/graphics/{name}/virtual_size").strip() == f"{width},{height}"
    blobs = guest.run("for e in /sys/class/drm/card*-*/edid; do od -An -v -tx1 $e | tr -d ' \\n'; echo; done").split()
    assert len(blobs) == 3
    for (width, _), blob in zip(MONITORS.values(), blobs, strict=True):
        assert f"M {width}\n".encode() in bytes.fromhex(blob)


def test_the_text_console_is_shown(guest: Guest, displays: dict[str, Display], framebuffers: dict[int, str], tmp_path: Path):
    """The kernel's console takes the first display when there is something to say, and we see every pixel of it."""
    small = displays["mbochs-small"]
    guest.run("printf '\\033[?25l\\033[32mHello from the guest\\033[0m\\n' > /dev/tty1; uname -a > /dev/tty1; ls -l / > /dev/tty1")
    guest.run("echo 0 > /sys/class/graphics/fbcon/cursor_blink")
    wait_for_memory(guest, small, framebuffers[800])
    shown = screenshot(small, tmp_path)
    assert {(0, 170, 0), (170, 170, 170), (0, 0, 0)} == {colour for _, colour in shown.getcolors()}
    if KEEP:
        shown.save(Path(KEEP) / "display-console.png", optimize=True)


def wait_for_memory(guest: Guest, display: Display, name: str) -> None:
    """Wait until the display's memory is, byte for byte, what the guest reads from a framebuffer."""
    deadline = time.monotonic() + PATIENCE
    path = display.mdev.get_attribute("screen_path")
    while True:
        with Screen(path) as screen, contextlib.suppress(MdevError):
            data = screen.look().data
            ours = hashlib.md5(data).hexdigest()
            theirs = guest.run(f"head -c {len(data)} /dev/{name} | md5sum").split()[0]
            if ours == theirs:
                return
        assert time.monotonic() < deadline, "what is shown is not what the guest drew"


def test_what_is_drawn_is_what_is_seen(guest: Guest, displays: dict[str, Display], framebuffers: dict[int, str], tmp_path: Path):
    guest.run(NO_CONSOLE)
    for type_id, (width, height) in MONITORS.items():
        display, name = displays[type_id], framebuffers[width]
        guest.run(f"echo 0 > /sys/class/graphics/{name}/blank; cat /pattern-{width} > /dev/{name}")
        wait_for_picture(display, picture((width, height), PATTERNS[width]), tmp_path)
        assert display.counter.regions.get(0, 0) == 0, f"BAR 0 of {type_id} was reached by message"
        assert display.counter.regions[2] > 10, "the count counts"


def modetest(guest: Guest, display: Display, name: str, mode: str) -> None:
    """Have modetest show its tiles in `mode`, until it is killed."""
    address = Path(guest.run(f"readlink -f /sys/class/graphics/{name}/device").strip()).name
    run = f"/lib/ld.so --library-path /lib /modetest -D pci:{address} -M bochs-drm"
    connectors = guest.run(f"{run} -c")
    number = re.search(r"^(\d+)\s+\d+\s+connected", connectors, re.MULTILINE)
    assert number is not None, connectors
    guest.run(f"(sleep 60 | {run} -F tiles -s {number[1]}:{mode}) >/modetest.log 2>&1 & true")


def tiles(width: int, height: int) -> bytes:
    """Return what modetest's pattern of tiles is (libdrm, tests/util/pattern.c), blue first."""
    rows = []
    for row in range(height):
        for column in range(width):
            quotient, remainder = divmod(row + column, width)
            rows.append((0x00130502 * (quotient >> 6) + 0x000A1120 * (remainder >> 6)) & 0xFFFFFF)
    return struct.pack(f"<{len(rows)}I", *rows)


def test_a_change_of_mode(guest: Guest, displays: dict[str, Display], framebuffers: dict[int, str], tmp_path: Path, kit: Kit):
    if not _programs(kit):
        pytest.skip("the guest's root has no modetest (libdrm-tests); make it anew with: ./dev guests")
    display = displays["mbochs-medium"]
    before = dict(display.counter.regions)
    modetest(guest, display, framebuffers[1024], "640x480")
    wait_for_picture(display, picture((640, 480), tiles(640, 480)), tmp_path)
    if KEEP:
        screenshot(display, tmp_path).save(Path(KEEP) / "display-modetest.png", optimize=True)
    assert display.counter.regions.get(0, 0) == 0
    assert display.counter.regions[2] > before[2]


def test_mdpy_is_found_and_drawn_on(guest: Guest, displays: dict[str, Display], tmp_path: Path):
    """A guest driver finds format and size in the vendor capability, and the framebuffer in BAR 0."""
    display = displays["mdpy-vga"]
    gradient = bytes(row * 255 // 480 for row in range(480) for _ in range(640 * 4))
    wait_for_picture(display, picture((640, 480), gradient), tmp_path)
    ids = guest.run("cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/vendor $d/device); done").splitlines()
    (address,) = [line.split()[0] for line in ids if line.endswith("0x1b36 0x000f")]
    folder = f"/sys/bus/pci/devices/{address}"
    config = bytes.fromhex(guest.run(f"od -An -v -tx1 {folder}/config | tr -d ' \\n'"))
    at = config[0x34]
    assert (config[at], struct.unpack_from("<4sII", config, at + 4)) == (9, (b"XR24", 640, 480))
    assert struct.unpack_from("<HHHH", config, 0)[:2] + struct.unpack_from("<HH", config, 0x2C) == (0x1B36, 0xF, 0x1AF4, 0x1100)
    start = int(guest.run(f"cat {folder}/resource").split()[0], 16)
    guest.run(f"echo 1 > {folder}/enable")
    drawn = bytearray(gradient)
    commands = []
    for place in random.Random(4).sample(range(640 * 480), 100):
        value = random.Random(place).getrandbits(32)
        struct.pack_into("<I", drawn, place * 4, value)
        commands.append(f"devmem {start + place * 4:#x} 32 {value:#x}")
    guest.run("\n".join(commands), timeout=60)
    wait_for_picture(display, picture((640, 480), bytes(drawn)), tmp_path)
    assert display.counter.regions.get(0, 0) == 0


def test_a_reboot_draws_the_gradient_again_and_bochs_works_again(guest: Guest, displays: dict[str, Display], tmp_path: Path):
    guest.reboot()
    gradient = bytes(row * 255 // 480 for row in range(480) for _ in range(640 * 4))
    wait_for_picture(displays["mdpy-vga"], picture((640, 480), gradient), tmp_path)
    width, height = MONITORS["mbochs-small"]
    guest.wait("ls /dev/fb2")
    guest.run(NO_CONSOLE)
    guest.run(f"echo 0 > /sys/class/graphics/fb0/blank; cat /pattern-{width} > /dev/fb0")
    wait_for_picture(displays["mbochs-small"], picture((width, height), PATTERNS[width]), tmp_path)
