"""mbochs as clients and guests find it: configuration space, registers, modes, planes, the monitor; and the sample's mistakes."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit import MdevError
from mdevkit.screen import Frame
from mdevkit_mbochs.mbochs.model import MbochsDevice, SampleMbochs
from mdevkit_vfio.ops import GfxPlane, IrqRequest
from mdevkit_vfio.uapi import Device, IrqSet, RegionFlag

PRIMARY = 1
XR24 = 0x34325258


def expected_config(size: int) -> bytes:
    data = bytearray(size)
    for offset, text in {0x00: "34121111", 0x04: "0300", 0x08: "01", 0x0A: "8003", 0x10: "08000000", 0x2C: "f41a0011"}.items():
        data[offset : offset + len(text) // 2] = bytes.fromhex(text)
    return bytes(data)


@pytest.mark.parametrize(("compat", "size"), [("none", 256), ("linux", 255)])
def test_configuration_space_is_the_samples(card: Callable[..., Any], compat: str, size: int):
    ops = card(compat=compat).ops
    assert ops.region_info(7).size == size
    assert ops.read(7, 0, size) == expected_config(size)
    for offset, bits in ((0x10, 0xFFC00008), (0x18, 0xFFFFF000), (0x14, 0), (0x1C, 0)):
        ops.write(7, offset, b"\xff\xff\xff\xff")
        assert int.from_bytes(ops.read(7, offset, 4), "little") == bits
    ops.write(7, 0x10, (0xFD000000).to_bytes(4, "little"))
    assert int.from_bytes(ops.read(7, 0x10, 4), "little") == 0xFD000008


def test_what_it_says_of_itself(card: Callable[..., Any]):
    ops = card("mbochs-medium").ops
    assert (ops.info().flags, ops.info().num_regions, ops.info().num_irqs) == (Device.PCI | Device.RESET, 10, 5)
    assert [ops.region_info(index).size for index in range(10)] == [16 << 20, 0, 4096, 0, 0, 0, 0, 256, 0, 4096]
    assert ops.region_info(0).flags == RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
    assert ops.region_info(9).type == (1, 1)
    assert [ops.irq_info(index).count for index in range(3)] == [0, 0, 0]
    with pytest.raises(MdevError, match="no region 10"):
        ops.region_info(10)


@pytest.mark.parametrize(("type_id", "units"), [("mbochs-small", 64), ("mbochs-medium", 256), ("mbochs-large", 1024)])
def test_dispi_registers_after_reset(card: Callable[..., Any], type_id: str, units: int):
    device = card(type_id)
    wanted = [0xB0C5, 0, 0, 0, 0, 0, 0, 0, 0, 0, units]
    assert [device.dispi(index) for index in range(11)] == wanted
    for index in range(11):
        assert device.dispi(index, 0x1234 + index) == 0x1234 + index, "all are plain, the identity too"
    device.ops.reset()
    assert [device.dispi(index) for index in range(11)] == wanted


@pytest.mark.parametrize("width", [1, 4, 8])
def test_dispi_takes_two_bytes_at_a_time(card: Callable[..., Any], width: int):
    ops = card().ops
    ops.write(2, 0x500, b"\xff" * width)
    assert ops.read(2, 0x500, width) == bytes(width)
    assert ops.read(2, 0x500, 2) == b"\xc5\xb0"
    assert ops.read(2, 0x501, 2) == b"\0\0", "no two bytes at an odd place"


@pytest.mark.parametrize("offset", [0x400, 0x41E, 0x4FE, 0x516, 0x600, 0x604, 0xFFC])
def test_nothing_else_is_there(card: Callable[..., Any], offset: int):
    ops = card().ops
    ops.write(2, offset, b"\xff\xff")
    assert ops.read(2, offset, 2) == b"\0\0"


MODES = [
    ((800, 600), {}, Frame(800, 600, 3200)),
    ((64, 64), {}, Frame(64, 64, 256)),
    ((640, 480), {"virtual": 1000}, Frame(640, 480, 4000)),
    ((640, 480), {"virtual": 100}, Frame(640, 480, 2560)),
    ((641, 479), {"virtual": 643, "x": 1, "y": 3}, Frame(641, 479, 2572, 4 + 3 * 2572)),
    ((640, 480), {"y": 480}, Frame(640, 480, 2560, 480 * 2560)),
    ((1024, 1024), {}, Frame(1024, 1024, 4096)),
    ((1024, 1024), {"x": 1}, None),
    ((1024, 1025), {}, None),
    ((640, 480), {"y": 1159}, None),
    ((63, 480), {}, None),
    ((640, 63), {}, None),
    ((640, 480), {"bpp": 24}, None),
    ((640, 480), {"bpp": 0}, None),
    ((640, 480), {"enable": 0x40}, None),
    ((640, 480), {"enable": 0x01}, Frame(640, 480, 2560)),
    ((0xFFFF, 0xFFFF), {"virtual": 0xFFFF, "x": 0xFFFF, "y": 0xFFFF}, None),
]


@pytest.mark.parametrize(("size", "more", "frame"), MODES)
def test_modes(card: Callable[..., Any], size: tuple[int, int], more: dict[str, int], frame: Frame | None):
    device = card()
    device.set_mode(*size, **more)
    assert device.ops.frame() == frame
    plane = device.ops.query_gfx_plane(PRIMARY)
    if frame is None:
        assert plane == GfxPlane()
    else:
        shape = (plane.width, plane.height, plane.stride, plane.size)
        assert shape == (frame.width, frame.height, frame.stride, frame.stride * frame.height)
        assert (plane.drm_format, plane.region_index) == (XR24, 0)
    assert device.ops.query_gfx_plane(0) == device.ops.query_gfx_plane(2) == GfxPlane()


def test_dma_buffers(card: Callable[..., Any]):
    """An id is a mode's; the buffer starts at the picture, shares its bytes and outlives the client."""
    device = card()
    ops = device.ops
    device.set_mode(640, 480)
    assert ops.query_gfx_plane(PRIMARY).dmabuf_id == 1
    device.set_mode(1024, 768, y=4)
    assert ops.query_gfx_plane(PRIMARY).dmabuf_id == 2
    assert ops.query_gfx_plane(PRIMARY).dmabuf_id == 2
    device.fill(b"pixel", 4 * 4096)
    fd = ops.gfx_dmabuf(2)
    try:
        assert os.read(fd, 5) == b"pixel"
        os.pwrite(fd, b"PIXEL", 4 * 4096)
        assert device.memory[4 * 4096 : 4 * 4096 + 5] == b"PIXEL"
        ops.release()
        assert os.pread(fd, 5, 4 * 4096) == b"PIXEL"
        with mmap.mmap(fd, 4096, offset=4 * 4096) as memory:
            assert memory[:5] == b"PIXEL"
    finally:
        os.close(fd)
    with pytest.raises(MdevError, match="has no DMA buffer 2") as caught:
        ops.gfx_dmabuf(2)
    assert caught.value.errno == errno.ENOENT


def test_a_dma_buffer_begins_at_a_page(card: Callable[..., Any]):
    device = card()
    device.set_mode(640, 480, x=1)
    with pytest.raises(MdevError, match="4 bytes into the memory does not begin at a page") as caught:
        device.ops.gfx_dmabuf(device.ops.query_gfx_plane(PRIMARY).dmabuf_id)
    assert caught.value.errno == errno.EINVAL


def test_a_reset_leaves_memory_and_monitor(card: Callable[..., Any]):
    device = card()
    device.fill(b"drawn")
    blob = device.ops.read(2, 0, 128)
    device.ops.reset()
    assert device.memory[:5] == b"drawn"
    assert device.ops.read(2, 0, 128) == blob != bytes(128)


def test_the_next_client_finds_nothing_of_the_last(card: Callable[..., Any]):
    device = card()
    fresh = device.ops.read(2, 0, 4096), device.ops.read(9, 0, 4096)
    device.fill(b"secret")
    device.set_mode(640, 480)
    device.ops.write(9, 20, (2).to_bytes(4, "little"))
    device.ops.write(9, 0x800, b"monitor")
    device.ops.release()
    again = type(device)(device.mdev)
    assert (again.ops.read(2, 0, 4096), again.ops.read(9, 0, 4096)) == fresh
    assert again.memory[:6] == bytes(6)


def test_a_client_brings_a_monitor(card: Callable[..., Any]):
    """Link down, blob and size, link up; the guest sees it only then, and as much of it as there is."""
    ops = card().ops

    def register(offset: int, value: int | None = None) -> int:
        if value is not None:
            ops.write(9, offset, value.to_bytes(4, "little"))
        return int.from_bytes(ops.read(9, offset, 4), "little")

    assert [register(offset) for offset in range(0, 28, 4)] == [0x800, 0x400, 128, 800, 600, 1, 0]
    assert register(20, 2) == 2
    assert ops.read(2, 0, 1024) == bytes(1024)
    ops.write(9, 0x800, bytes(range(200)))
    assert register(8, 200) == 200
    assert register(20, 1) == 1
    assert ops.read(2, 0, 256) == bytes(range(200)) + bytes(56)
    for offset in (0, 4, 12, 16):
        before = register(offset)
        assert register(offset, 7) == before, "read-only"
    assert register(8, 0x401) == 200, "too long"
    assert register(20, 3) == 1, "no state of a link"
    ops.write(9, 9, b"\xff")
    ops.write(9, 10, b"\xff\xff")
    assert register(8) == 200, "4 bytes at a time only"
    ops.write(2, 0, bytes(1024))
    assert ops.read(2, 0, 4) == b"\0\1\2\3", "a guest cannot write it"


def test_compat_linux_is_the_sample(card: Callable[..., Any]):
    device = card(compat="linux")
    ops = device.ops
    assert isinstance(ops, SampleMbochs)
    assert ops.info().flags == Device.PCI
    assert [ops.irq_info(index).count for index in range(5)] == [0] * 5
    with pytest.raises(MdevError, match="has no interrupts") as caught:
        ops.set_irqs(IrqRequest(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, 0, 0, 0))
    assert caught.value.errno == errno.EINVAL
    assert ops.read(9, 20, 4) == bytes(4), "no monitor"
    ops.write(0, 0, b"shifted")
    assert device.memory[8192 : 8192 + 7] == b"shifted"
    assert ops.read(0, 0, 7) == b"shifted"
    end = (4 << 20) - 8192
    ops.write(0, end - 4, bytes(range(1, 9)))
    assert ops.read(0, end - 4, 8) == b"\1\2\3\4\0\0\0\0"
    device.set_mode(640, 480)
    with pytest.raises(MdevError, match="the first query of a mode fails") as caught:
        ops.query_gfx_plane(PRIMARY)
    assert caught.value.errno == errno.ENOMEM
    assert ops.query_gfx_plane(PRIMARY).dmabuf_id == 1


WRITES = st.tuples(st.sampled_from([2, 9]), st.integers(0, 0xFFF), st.binary(min_size=1, max_size=16))


@settings(max_examples=200, deadline=None)
@given(st.lists(WRITES, max_size=60), st.sampled_from([MbochsDevice, SampleMbochs]))
def test_no_write_can_break_it(writes: list[tuple[int, int, bytes]], kind: type[MbochsDevice]):
    """Whatever the registers hold, a picture lies in the memory, and reset brings them back."""
    device = kind(4 << 20)
    try:
        fresh = device.read(2, 0x500, 22)
        for region, offset, data in writes:
            device.write(region, offset, data[: 0x1000 - offset])
            device.read(region, offset, len(data[: 0x1000 - offset]))
        frame = device.frame()
        if frame is not None:
            assert frame.offset + frame.stride * frame.height <= device.memory_size
            assert frame.stride >= frame.width * 4
            assert min(frame.width, frame.height) >= 64
        device.reset()
        assert device.read(2, 0x500, 22) == b"".join(
            int.from_bytes(fresh[at : at + 2], "little").to_bytes(2, "little") for at in range(0, 22, 2)
        )
    finally:
        device.close()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 0xFFFF), min_size=11, max_size=11))
def test_any_values_of_the_registers(values: list[int]):
    device = MbochsDevice(4 << 20)
    try:
        for index, value in enumerate(values):
            device.bar_write(2, 0x500 + 2 * index, 2, value)
        frame = device.frame()
        _, width, height, bpp, enable, _, virtual, _, x, y, _ = values
        stride = 4 * max(virtual, width)
        fits = 4 * x + y * stride + stride * height <= 4 << 20
        shown = bool(enable & 1) and bpp == 32 and width >= 64 and height >= 64 and fits
        assert (frame is not None) == shown
    finally:
        device.close()


@pytest.mark.parametrize("change", [lambda state: state[:-1], lambda state: state[:-1000], lambda state: state + b"\0"])
def test_a_state_of_another_length_is_refused(card: Callable[..., Any], change: Callable[[bytes], bytes]):
    device = card()
    device.set_mode(640, 480)
    state = device.ops.checkpoint()
    device.set_mode(800, 600)
    with pytest.raises(MdevError, match="bytes are not the state of this card") as caught:
        device.ops.restore(change(state))
    assert caught.value.errno == errno.EINVAL
    assert device.ops.frame() == Frame(800, 600, 3200)


def test_a_device_goes_on_in_another_process(card: Callable[..., Any]):
    """What parking carries over: registers, monitor, video memory."""
    device = card()
    device.set_mode(640, 480, y=5)
    noise = random.Random(1).randbytes(640 * 480 * 4)
    device.fill(noise, 5 * 2560)
    assert device.ops.parkable
    other = MbochsDevice(4 << 20, (800, 600))
    try:
        other.adopt({name: os.dup(fd) for name, fd in device.ops.files().items()})
        other.restore(device.ops.checkpoint())
        frame, memory = other.scanout()
        assert frame == Frame(640, 480, 2560, 5 * 2560)
        assert memory[frame.offset : frame.offset + len(noise)] == noise
        assert other.edid() == device.ops.edid() != b""
    finally:
        other.close()
