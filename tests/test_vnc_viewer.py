"""A VNC viewer that is not ours, vncdotool, reads the picture that was drawn: at a socket and a port, with a password and without.

It runs in a process of its own, as its users run it.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mdevkit import Registry
from mdevkit_vfio.client import VfioUserClient

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow: pip install -r requirements-dev.txt")
#: Beside our own Python where the environment has it, else wherever.
VNCDO = shutil.which("vncdo", path=str(Path(sys.executable).parent)) or shutil.which("vncdo")
pytestmark = pytest.mark.skipif(VNCDO is None, reason="no vncdo here: pip install -r requirements-dev.txt (vncdotool)")

Look = Callable[..., Any]


@pytest.fixture
def registry(runtime_folder: Path) -> Iterator[Registry]:
    del runtime_folder  # the devices' sockets and screens are there
    with Registry.discover() as registry:
        yield registry


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """Take a picture with vncdotool; what it says if it cannot."""

    def take(server: str, *options: str, after: tuple[str, ...] = ()) -> Any:
        file = tmp_path / "vnc.png"
        command = [str(VNCDO), "--timeout=20", f"--server={server}", *options, *after, "capture", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise ConnectionError(done.stdout + done.stderr)
        with Image.open(file) as image:
            return image.convert("RGB")

    return take


def port_of(mdev: Any) -> str:
    """vncdotool writes a port, not a display's number, after two colons."""
    address: str = mdev.get_attribute("vnc_address")
    return address.replace(":", "::")


class Painter:
    """A client of an mbochs, which sets modes and draws noise."""

    def __init__(self, client: VfioUserClient) -> None:
        self.registers = client.region(2)
        self.memory = client.region(0).map()

    def draw(self, width: int, height: int, seed: int = 1) -> Any:
        """Set a mode, fill it, and return the picture."""
        for index, value in ((4, 0), (3, 32), (1, width), (2, height), (6, width), (4, 0x41)):
            self.registers.write_int(0x500 + 2 * index, 2, value)
        data = random.Random(seed).randbytes(width * height * 4)
        self.memory[: len(data)] = data
        return Image.frombytes("RGB", (width, height), data, "raw", "BGRX")


@contextlib.contextmanager
def painting(mdev: Any) -> Iterator[Painter]:
    with VfioUserClient.connect(mdev.endpoint.describe()["socket"]) as client:
        yield Painter(client)


def same(one: Any, other: Any) -> bool:
    return bool(one.size == other.size and one.tobytes() == other.tobytes())


def test_the_same_picture_through_a_port_with_a_password(registry: Registry, look: Look, tmp_path: Path):
    (tmp_path / "password").write_text("let me in\n")
    (tmp_path / "password").chmod(0o600)
    params = {"vnc": "tcp:0", "vnc_password_file": f"{tmp_path}/password"}
    mdev = registry.create("mbochs-small", params=params)
    with painting(mdev) as painter:
        wanted = painter.draw(700, 500)
        assert same(look(port_of(mdev), "--password=let me in"), wanted)
        with pytest.raises(ConnectionError):
            look(port_of(mdev), "--password=wrong")
        assert same(look(port_of(mdev), "--password=let me in"), wanted), "the next one is let in"


def test_the_same_picture_through_a_socket(registry: Registry, look: Look, tmp_path: Path):
    mdev = registry.create("mbochs-small", params={"vnc": f"unix:{tmp_path}/vnc"})
    with painting(mdev) as painter:
        wanted = painter.draw(801, 333)
        assert same(look(f"{tmp_path}/vnc"), wanted)


def test_two_viewers_and_a_change_of_size(registry: Registry, look: Look, tmp_path: Path):
    """One stays while the other comes, the size changes, and each sees what is there when it takes its picture."""
    mdev = registry.create("mbochs-small", params={"vnc": "tcp:0", "vnc_insecure": "yes"})
    with painting(mdev) as painter:
        painter.draw(640, 480)
        file = tmp_path / "first.png"
        command = [str(VNCDO), "--timeout=30", f"--server={port_of(mdev)}", "capture", f"{tmp_path}/before.png", "pause", "4"]
        with subprocess.Popen([*command, "capture", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
            while not (tmp_path / "before.png").exists():
                assert first.poll() is None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    first.wait(0.05)  # it tells nobody but by this file
            wanted = painter.draw(500, 400, seed=2)
            assert same(look(port_of(mdev)), wanted)
        assert first.returncode == 0
        with Image.open(file) as image:
            assert same(image.convert("RGB").crop((0, 0, 500, 400)), wanted)


def test_mdpy_too(registry: Registry, look: Look):
    mdev = registry.create("mdpy-xga", params={"vnc": "tcp:0", "vnc_insecure": "yes"})
    gradient = b"".join(bytes([row * 255 // 768]) * 1024 * 3 for row in range(768))
    assert same(look(port_of(mdev)), Image.frombytes("RGB", (1024, 768), gradient))
