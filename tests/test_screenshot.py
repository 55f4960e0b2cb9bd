"""``mdevkit screenshot`` and ``mdevkit console`` on displays, as users have them: real processes, a real terminal, a service."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mdevkit_vfio.client import VfioUserClient

from tests.services import HEEDS_SIGNALS, foreground, private_service, wait_until

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow: pip install -r requirements-dev.txt")
MDEVKIT = Path(sys.executable).with_name("mdevkit")
UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00d"
GRADIENT = b"".join(bytes([row * 255 // 480]) * 640 * 3 for row in range(480))


@pytest.fixture
def service():
    with private_service("mdevkit-mtty,mdevkit-mbochs,mdevkit-vfio") as running:
        yield running


@pytest.fixture
def run(service):
    """Starts a device in the foreground and returns its facts."""
    with foreground(service, UUID) as start:
        yield lambda *words: start(*words)[1]


def pixels(file):
    with Image.open(file) as image:
        return image.size, image.convert("RGB").tobytes()


def draw(client, width, height, seed=1):
    """Set a mode and fill it with noise, as a guest would; return what a screenshot has to be."""
    registers, memory = client.region(2), client.region(0).map()
    for index, value in ((4, 0), (3, 32), (1, width), (2, height), (6, width), (4, 0x41)):
        registers.write_int(0x500 + 2 * index, 2, value)
    data = random.Random(seed).randbytes(width * height * 4)
    memory[: len(data)] = data
    return (width, height), Image.frombytes("RGB", (width, height), data, "raw", "BGRX").tobytes()


def test_of_a_device_in_the_foreground(service, run, tmp_path):
    run("mdpy-vga")
    file = tmp_path / "shot.png"
    done = service.mdevkit("screenshot", UUID[:4], str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert pixels(file) == ((640, 480), GRADIENT)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~_umask()
    assert list(tmp_path.glob(".*")) == []


def _umask():
    before = os.umask(0)
    os.umask(before)
    return before


def test_of_a_device_of_the_service(service, tmp_path):
    service.start()
    uuid = service.mdevkit("create", "mbochs-small").stdout.strip()
    file = tmp_path / "shot.png"
    off = service.mdevkit("screenshot", uuid, str(file))
    assert off.returncode == 1
    assert off.stderr == f"mbochs {uuid} shows nothing: the guest has set no mode [ENODATA]\n"
    socket = json.loads(service.mdevkit("attach", uuid, "--json").stdout)["socket"]
    with VfioUserClient.connect(socket) as client:
        wanted = draw(client, 777, 555)
        assert service.mdevkit("screenshot", uuid, str(file)).returncode == 0
        assert pixels(file) == wanted


def test_a_display_survives_the_death_of_its_host(service, tmp_path):
    """The guest's picture is where it was; new looks find it in the new process."""
    service.start()
    uuid = service.mdevkit("create", "mbochs-small").stdout.strip()
    socket = json.loads(service.mdevkit("attach", uuid, "--json").stdout)["socket"]
    file = tmp_path / "shot.png"
    with VfioUserClient.connect(socket) as client:
        wanted = draw(client, 320, 200)
        service.kill_host("mbochs")
        assert client.region(2).read_int(0x502, 2) == 320
        wait_until(lambda: service.mdevkit("screenshot", uuid, str(file)).returncode == 0, what="a screenshot from the new host")
        assert pixels(file) == wanted


def test_watch_writes_the_latest(service, run, tmp_path):
    facts = run("mbochs-small")
    file = tmp_path / "shot.png"
    command = [*HEEDS_SIGNALS, str(MDEVKIT), "screenshot", UUID, str(file), "--watch", "--interval", "0.02"]
    with subprocess.Popen(command, env=service.environment, stderr=subprocess.PIPE, text=True) as watch:
        try:
            with VfioUserClient.connect(facts["socket"]) as client:
                for seed, size in enumerate(((640, 480), (640, 480), (100, 100))):
                    wanted = draw(client, *size, seed)
                    wait_until(lambda wanted=wanted: file.exists() and pixels(file) == wanted, what="the latest picture")
                written = file.stat().st_mtime_ns
                time.sleep(0.2)  # ten looks at a picture that does not change
                assert file.stat().st_mtime_ns == written
        except BaseException:
            watch.kill()
            raise
        watch.send_signal(signal.SIGINT)
        assert watch.wait(10) == 130


ERRORS = [
    (["mtty-1"], f"device {UUID} has no display [EOPNOTSUPP]"),
    (["mdpy-vga", "--set", "screen_socket=none"], f"device {UUID} has a display, but lets nobody look (screen_socket) [ENOTCONN]"),
]


@pytest.mark.parametrize(("words", "text"), ERRORS)
def test_what_cannot_be_looked_at(service, run, words, text):
    run(*words)
    done = service.mdevkit("screenshot", UUID, "shot.png")
    assert (done.returncode, done.stderr) == (1, f"{text}\n")


def test_mistakes(service, run, tmp_path):
    run("mdpy-vga")
    bad = service.mdevkit("screenshot", UUID, str(tmp_path / "shot.xyz"))
    assert bad.returncode == 2
    assert "does not say by its ending which format is wanted (.png)" in bad.stderr
    nowhere = service.mdevkit("screenshot", UUID, "/nowhere/shot.png")
    assert nowhere.returncode == 1
    assert nowhere.stderr == "/nowhere/shot.png cannot be written: No such file or directory [ENOENT]\n"
    other = service.mdevkit("screenshot", "ffffffff", str(tmp_path / "shot.png"))
    assert other.stderr == "there is no running device 'ffffffff' [ENODEV]\n"


def test_without_pillow(service, run, tmp_path):
    """A module of that name that cannot be imported stands in its way."""
    run("mdpy-vga")
    (tmp_path / "PIL.py").write_text("raise ImportError\n")
    done = service.mdevkit("screenshot", UUID, str(tmp_path / "shot.png"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "pictures need Pillow, which is not installed (pip install 'mdevkit-mbochs[screenshot]') [ENOPKG]\n"


def test_console_in_a_pipe_shows_the_display_once(service, run):
    run("mdpy-vga")
    lines = service.mdevkit("console", UUID).stdout.splitlines()
    assert len(lines) == 24
    shades = [re.match(r"\x1b\[38;2;(\d+);\d+;\d+;48;2;(\d+);\d+;\d+m(▀+)", line) for line in lines]
    values = [int(value) for shade in shades for value in shade.groups()[:2]]
    assert values == sorted(values)
    assert (values[0] < 10, values[-1] > 240, len(shades[0][3])) == (True, True, 64)


def test_console_in_a_terminal_follows_and_leaves(service, run):
    facts = run("mbochs-small")
    master, slave = pty.openpty()
    with subprocess.Popen([MDEVKIT, "console", UUID], stdin=slave, stdout=slave, stderr=slave, env=service.environment) as console:
        os.close(slave)
        seen = _until(master, b"the display shows nothing")
        with VfioUserClient.connect(facts["socket"]) as client:
            draw(client, 64, 64)
            seen += _until(master, "▀".encode())
            os.write(master, b"\x1d")
            seen += _until(master, b"\x1b[?1049l")
        assert console.wait(10) == 0
    assert seen.index(b"Ctrl-] leaves") < seen.index(b"\x1b[?1049h")
    os.close(master)


def _until(terminal, text):
    data = b""
    deadline = time.monotonic() + 20
    while text not in data:
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], data[-500:]
        data += os.read(terminal, 65536)
    return data


def test_console_of_neither(service):
    done = service.mdevkit("console", UUID)
    assert done.stderr == f"there is no running device '{UUID}' [ENODEV]\n"
