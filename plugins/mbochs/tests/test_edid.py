"""EDID: what is made is what the standard says, read back by the numbers; and what is no EDID is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mdevkit import MdevError
from mdevkit_mbochs.edid import LEAST, MOST, check, generate

SIDES = st.integers(LEAST, MOST)
NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=13)


@given(
    SIDES, SIDES, st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=13), st.integers(0, 2**32 - 1)
)
def test_a_block_tells_what_it_was_made_of(width: int, height: int, name: str, serial: int):
    block = generate(width, height, name=name, serial=serial)
    check(block, 1024)
    assert len(block) == 128
    timing = block[54:72]
    clock = struct.unpack_from("<H", timing)[0] * 10000
    assert timing[2] | (timing[4] >> 4) << 8 == width
    assert timing[5] | (timing[7] >> 4) << 8 == height
    across, down = timing[3] | (timing[4] & 15) << 8, timing[6] | (timing[7] & 15) << 8
    assert 20 < clock / ((width + across) * (height + down)) < 60.5
    assert struct.unpack_from("<I", block, 12)[0] == serial
    texts = {block[at + 3]: block[at + 5 : at + 18].partition(b"\n")[0].decode() for at in (72, 90)}
    assert texts == {0xFC: name, 0xFF: str(serial)}
    assert block[8:10] == b"\x34\x96", "MDV, five bits a letter"


OFFERED = [
    ((800, 600), (800, 600), (0x21, 0)),
    ((1920, 1080), (0, 0), (0x21, 8)),
    ((640, 480), (0, 0), (0x20, 0)),
    ((600, 400), (0, 0), (0, 0)),
]


@pytest.mark.parametrize(("size", "limit", "bits"), OFFERED)
def test_smaller_modes_are_offered(size: tuple[int, int], limit: tuple[int, int], bits: tuple[int, int]):
    block = generate(*size, name="x", serial=0, limit=limit)
    assert tuple(block[35:37]) == bits


@pytest.mark.parametrize(("width", "height"), [(63, 480), (4096, 480), (640, 63), (640, 4096)])
def test_impossible_sizes(width: int, height: int):
    with pytest.raises(ValueError, match="64 to 4095 pixels each way are possible"):
        generate(width, height, name="x", serial=0)


def test_a_long_name():
    with pytest.raises(ValueError, match="has 14 characters, 13 are possible"):
        generate(640, 480, name="12345678901234", serial=0)


GOOD = generate(640, 480, name="x", serial=0)
WRONG = [
    (GOOD[:-1], "EDID has blocks of 128 bytes, here up to 8; these are 127 bytes"),
    (GOOD * 9, "these are 1152 bytes"),
    (b"\1" + GOOD[1:], "EDID begins with 00ffffffffffff00, not with 01ffffffffffff00"),
    (GOOD * 2, "2 blocks are there, 1 are announced"),
    (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "the checksum of block 0 is"),
]


@pytest.mark.parametrize(("blob", "text"), WRONG)
def test_what_is_no_edid_is_refused(card: Callable[..., Any], blob: bytes, text: str):
    mdev = card().mdev
    before = mdev.get_attribute("edid")
    with pytest.raises(MdevError) as caught:
        mdev.set_attribute("edid", blob.hex())
    assert text in str(caught.value)
    assert mdev.get_attribute("edid") == before


def test_attributes_make_the_monitor(card: Callable[..., Any]):
    device = card("mbochs-large", resolution="2560x1600", monitor="Big One", serial="77")
    mdev, ops = device.mdev, device.ops
    assert ops.read(2, 0, 128) == generate(2560, 1600, name="Big One", serial=77)
    mdev.set_attribute("resolution", "1280x720")
    assert ops.read(2, 0, 128) == generate(1280, 720, name="Big One", serial=77)
    mdev.set_attribute("edid", GOOD.hex())
    mdev.set_attribute("serial", 5)
    assert (ops.read(2, 0, 128), mdev.get_attribute("edid")) == (GOOD, GOOD.hex())
    mdev.set_attribute("edid", "none")
    assert (ops.read(2, 0, 128), mdev.get_attribute("edid")) == (bytes(128), "none")
    mdev.set_attribute("edid", "auto")
    assert ops.read(2, 0, 128) == generate(1280, 720, name="Big One", serial=5)
