"""mdpy: configuration space, the capability its driver reads, the gradient; and the sample's mistakes."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
from mdevkit import MdevError
from mdevkit_mbochs.mdpy.model import MdpyDevice, SampleMdpy
from mdevkit_vfio.uapi import Device, RegionFlag

SIZES = [("mdpy-vga", 640, 480, 2), ("mdpy-xga", 1024, 768, 4), ("mdpy-hd", 1920, 1080, 8)]


CONFIG = {0: "361b0f00", 4: "03001000", 8: "01", 0x0A: "8003", 0x10: "08", 0x2C: "f41a0011", 0x34: "40"}


def gradient(width: int, height: int) -> bytes:
    return b"".join(bytes([row * 255 // height]) * width * 4 for row in range(height))


@pytest.mark.parametrize(("compat", "size"), [("none", 256), ("linux", 255)])
@pytest.mark.parametrize(("type_id", "width", "height", "megabytes"), SIZES)
def test_configuration_space_is_the_samples(
    card: Callable[..., Any], type_id: str, width: int, height: int, megabytes: int, compat: str, size: int
):
    ops = card(type_id, compat=compat).ops
    expected = bytearray(size)
    for offset, data in (
        (0, "361b0f00"),
        (4, "03001000"),
        (8, "01"),
        (0x0A, "8003"),
        (0x10, "08"),
        (0x2C, "f41a0011"),
        (0x34, "40"),
    ):
        expected[offset : offset + len(data) // 2] = bytes.fromhex(data)
    struct.pack_into("<BBBx4sII", expected, 0x40, 9, 0, 16, b"XR24", width, height)
    assert ops.read(7, 0, size) == expected
    ops.write(7, 0x10, b"\xff\xff\xff\xff")
    assert int.from_bytes(ops.read(7, 0x10, 4), "little") == (1 << 32) - (megabytes << 20) + 8
    assert ops.region_info(0).size == megabytes << 20


@pytest.mark.parametrize(("type_id", "width", "height", "megabytes"), SIZES)
def test_the_gradient_comes_back(card: Callable[..., Any], type_id: str, width: int, height: int, megabytes: int):
    device = card(type_id)
    wanted = gradient(width, height)
    assert device.memory[: len(wanted)] == wanted
    device.fill(b"\xff" * 10000)
    device.ops.reset()
    assert device.memory[: len(wanted)] == wanted
    device.fill(b"\xff" * 10000)
    device.ops.release()
    frame, memory = device.ops.scanout()
    assert memory[: len(wanted)] == wanted
    assert (frame.width, frame.height, frame.stride, frame.offset) == (width, height, width * 4, 0)


def test_regions_and_plane(card: Callable[..., Any]):
    ops = card("mdpy-xga").ops
    assert (ops.info().flags, ops.info().num_regions) == (Device.PCI | Device.RESET, 17)
    assert [ops.region_info(index).size for index in (0, 1, 7, 8, 9, 15, 16)] == [4 << 20, 0, 256, 0, 0, 0, 4 << 20]
    assert ops.region_info(16).flags == RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
    assert ops.region_info(16).mapping.fd == ops.region_info(0).mapping.fd
    ops.write(16, 0x123456, b"both")
    assert ops.read(0, 0x123456, 4) == ops.read(16, 0x123456, 4) == b"both"
    plane = ops.query_gfx_plane(1)
    assert (plane.drm_format, plane.width, plane.height, plane.stride, plane.size) == (0x34325258, 1024, 768, 4096, 4 << 20)
    assert (plane.region_index, plane.dmabuf_id) == (16, 0)
    with pytest.raises(MdevError, match="no region 17"):
        ops.region_info(17)


def test_compat_linux_is_the_sample(card: Callable[..., Any]):
    device = card("mdpy-vga", compat="linux")
    ops = device.ops
    assert isinstance(ops, SampleMdpy)
    assert (ops.info().flags, ops.info().num_regions) == (Device.PCI, 9)
    assert ops.region_info(16).size == 2 << 20
    with pytest.raises(MdevError, match="has no region 9"):
        ops.region_info(9)
    ops.write(0, 0x1000, b"12345678")
    assert device.memory[:4] == b"5678", "every access hits the first bytes"
    assert device.memory[0x1000:0x1004] != b"1234"
    assert ops.read(0, 0x2000, 8) == b"56785678"
    assert ops.read(16, 0x2000, 4) == b"5678"


def test_a_device_goes_on_in_another_process(card: Callable[..., Any]):
    device = card("mdpy-vga")
    device.fill(b"drawn by the guest")
    other = MdpyDevice(640, 480)
    try:
        other.adopt({name: os.dup(fd) for name, fd in device.ops.files().items()})
        other.restore(device.ops.checkpoint())
        assert other.scanout()[1][:18] == b"drawn by the guest"
    finally:
        other.close()
