"""The configuration space against a plain array of bytes; and that no driver sees half of a change."""

import errno
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_virtio.config import ConfigSpace, Field

FIELDS = (Field("mac", 0, 6, writable=True), Field("word", 8, 2), Field("long", 12, 4, writable=True), Field("quad", 16, 8))


@pytest.fixture
def space():
    return ConfigSpace(FIELDS, 28)


def test_fields_are_little_endian_in_their_width(space):
    assert space.update(mac=b"\2\0\0\0\0\1", word=0x1234, long=0x12345678, quad=0x0123456789ABCDEF)
    assert space.read(0, 28).hex(" ") == ("02 00 00 00 00 01 00 00 34 12 00 00 78 56 34 12 ef cd ab 89 67 45 23 01 00 00 00 00")
    assert (space["word"], space["quad"], space.get_bytes("mac")) == (0x1234, 0x0123456789ABCDEF, b"\2\0\0\0\0\1")


def test_one_change_is_one_step_of_the_generation(space):
    steps = [space.update(word=1, long=2), space.update(word=1), space.update(word=2, long=2)]
    assert steps == [True, False, True]
    assert space.generation == 2
    assert not space.write(0, bytes(6))
    assert space.write(0, b"\1" * 6)
    assert space.generation == 3
    space.advance()
    assert space.generation == 4


def test_generation_is_32_bits_wide(space):
    space._generation = 0xFFFFFFFF
    space.update(word=7)
    assert space.generation == 0


@given(offset=st.integers(-3, 32), length=st.integers(-2, 32))
def test_every_range(offset, length):
    space = ConfigSpace(FIELDS, 28)
    writable = {*range(6), *range(12, 16)}
    inside = length > 0 and offset >= 0 and offset + length <= 28
    data = bytes(range(1, 1 + max(length, 0)))
    if not inside:
        with pytest.raises(
            MdevError, match=rf"{length} bytes at {offset} are not in the configuration space of 28 bytes"
        ) as caught:
            space.read(offset, length)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(MdevError, match="are not in the configuration space of 28 bytes"):
            space.write(offset, data)
    elif set(range(offset, offset + length)) <= writable:
        assert space.write(offset, data)
        assert space.read(offset, length) == data
    else:
        with pytest.raises(MdevError, match=rf"{length} bytes at {offset} of the configuration space are read-only") as caught:
            space.write(offset, data)
        assert caught.value.errno == errno.EACCES
        assert space.read(0, 28) == bytes(28)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"word": 65536}, OverflowError, "too big"),
        ({"word": -1}, OverflowError, "negative"),
        ({"mac": b"\1"}, ValueError, "field mac has 6 bytes, not 1"),
        ({"nothing": 1}, KeyError, "nothing"),
    ],
)
def test_values_that_do_not_fit(space, values, error, text):
    with pytest.raises(error, match=text):
        space.update(long=5, **values)
    assert space["long"] == 0
    assert space.generation == 0


@pytest.mark.parametrize(
    ("fields", "size", "text"),
    [
        ([Field("a", 0, 2), Field("a", 2, 2)], None, "a field is stated twice"),
        ([Field("a", 0, 4), Field("b", 3, 2)], None, "field b overlaps another one, or the end of the 5 bytes"),
        ([Field("a", 0, 4)], 3, "field a overlaps another one, or the end of the 3 bytes"),
        ([Field("a", 0, 0)], 3, "field a overlaps another one"),
        ([Field("a", -1, 2)], 3, "field a overlaps another one"),
    ],
)
def test_layouts_that_cannot_be(fields, size, text):
    with pytest.raises(ValueError, match=text):
        ConfigSpace(fields, size)


def test_no_space_at_all():
    with pytest.raises(MdevError, match="1 bytes at 0 are not in the configuration space of 0 bytes"):
        ConfigSpace().read(0, 1)


def test_a_change_is_seen_whole(space):
    """A reader that finds the same generation before and after has what belongs together (virtio 1.2, 2.5.2)."""
    done = threading.Event()

    def change():
        for number in range(1, 3000):
            space.update(word=number, long=number, quad=number)
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    looks = 0
    while not done.is_set() or not looks:
        before = space.generation
        values = (space["word"], space["long"], space["quad"])
        if space.generation == before:
            looks += 1
            assert len(set(values)) == 1
    thread.join()
    whole = space.read(0, 28)
    assert whole[8:10] == whole[12:14] == whole[16:18] == (2999).to_bytes(2, "little")
