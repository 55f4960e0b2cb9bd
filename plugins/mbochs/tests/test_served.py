"""Served over vfio-user: a client draws in mapped memory and writes registers by message, and onlookers see it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mdevkit import Mdev, MdevError, Registry
from mdevkit.screen import Picture, Screen
from mdevkit_vfio.bus import VfioBus
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.driver import VfioMdevDriver

DISPI = 0x500


@pytest.fixture
def served(registry: Registry, tmp_path: Path) -> Iterator[tuple[Mdev, VfioUserClient]]:
    registry.register_driver(VfioMdevDriver())
    mdev = registry.create("mbochs-small", params={"vnc": f"unix:{tmp_path}/vnc"})
    assert mdev.bus == VfioBus.name
    with VfioUserClient.connect(mdev.endpoint.describe()["socket"]) as client:
        yield mdev, client


def set_mode(client: VfioUserClient, width: int, height: int, virtual: int, x: int, y: int) -> None:
    values = ((4, 0), (3, 32), (1, width), (2, height), (5, 0), (6, virtual), (7, 0), (8, x), (9, y), (4, 0x41))
    for index, value in values:
        client.region(2).write_int(DISPI + 2 * index, 2, value)


MODES = [(640, 480, 640, 0, 0), (640, 480, 800, 0, 0), (333, 211, 1001, 7, 13), (65, 67, 0, 1, 1), (64, 64, 16000, 15936, 0)]


@pytest.mark.parametrize("mode", MODES)
def test_panning_strides_and_offsets(
    served: tuple[Mdev, VfioUserClient], vnc: Callable[[str], Any], without_padding: Callable[[bytes], bytes], mode: tuple[int, ...]
):
    mdev, client = served
    width, height, virtual, x, y = mode
    stride = max(width, virtual) * 4
    noise = random.Random(1).randbytes(4 << 20)
    client.region(0).map()[:] = noise
    set_mode(client, *mode)
    rows = b"".join(noise[(row + y) * stride + 4 * x :][: 4 * width] for row in range(height))
    with Screen(mdev.get_attribute("screen_path")) as screen:
        frame, data = screen.look().frame, screen.look().data
    assert (frame.width, frame.height, frame.stride) == (width, height, stride)
    assert b"".join(data[row * stride :][: 4 * width] for row in range(height)) == rows
    viewer = vnc(mdev.get_attribute("vnc_address")).log_in()
    viewer.set_encodings(16)
    viewer.look()
    assert viewer.colours == without_padding(rows)


def look(screen: Screen) -> Picture | None:
    try:
        return screen.look()
    except MdevError as error:
        if error.name != "ENODATA":
            raise
    return None


def test_random_writes_while_everybody_looks(served: tuple[Mdev, VfioUserClient], vnc: Callable[[str], Any]):
    """No register, in no width, keeps a device from answering, or an onlooker from a picture or a reason."""
    mdev, client = served
    numbers = random.Random(5)
    viewer = vnc(mdev.get_attribute("vnc_address")).log_in()
    viewer.set_encodings(16, -223)
    with Screen(mdev.get_attribute("screen_path")) as screen:
        for _ in range(300):
            region = numbers.choice((2, 2, 2, 7, 9))
            size = numbers.choice((1, 2, 2, 2, 4, 8))
            offset = numbers.choice((DISPI + 2 * numbers.randrange(11), numbers.randrange(0, client.region(region).size - 8)))
            with contextlib.suppress(MdevError):
                client.region(region).write(min(offset, client.region(region).size - size), numbers.randbytes(size))
            if numbers.random() < 0.2:
                set_mode(client, *(numbers.choice((64, 100, 640, 900)) for _ in range(2)), 0, 0, numbers.choice((0, 9999)))
            picture = look(screen)
            assert picture is None or len(picture.data) == picture.frame.size
        set_mode(client, 640, 480, 640, 0, 0)
        assert screen.look().frame.width == 640
    while (viewer.width, viewer.height) != (640, 480):
        viewer.look()
