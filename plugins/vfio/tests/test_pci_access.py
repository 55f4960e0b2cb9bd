"""How an access to a BAR is cut up, against definitions of the result instead of a second algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st
from mdevkit_vfio.pci.access import pieces, widths


@given(st.integers(0, 64), st.integers(0, 40), st.sampled_from([1, 2, 4, 8]))
def test_widths_cover_the_access_with_the_widest_aligned_parts(offset: int, count: int, widest: int) -> None:
    parts = list(widths(offset, count, widest))
    covered = [byte for start, width in parts for byte in range(start, start + width)]
    assert covered == list(range(offset, offset + count))
    for start, width in parts:
        assert width <= widest
        assert start % width == 0
        wider = 2 * width
        assert wider > widest or start % wider or start + wider > offset + count, "a wider one would have fitted"


def test_the_kernels_example() -> None:
    assert list(widths(1, 8, 4)) == [(1, 1), (2, 2), (4, 4), (8, 1)]
    assert list(widths(0, 8, 8)) == [(0, 8)]


@dataclass
class Part:
    """A window over nothing."""

    start: int
    end: int

    def read(self, offset: int, count: int) -> bytes:
        raise AssertionError(f"{offset} {count}")

    def write(self, offset: int, data: bytes) -> None:
        raise AssertionError(f"{offset} {data!r}")


@example([0, 8], 4, 0)
@given(st.lists(st.integers(0, 40), max_size=8, unique=True).map(sorted), st.integers(0, 48), st.integers(0, 48))
def test_pieces_say_for_every_byte_who_serves_it(edges: list[int], offset: int, count: int) -> None:
    windows = [Part(start, end) for start, end in zip(edges[::2], edges[1::2], strict=False)]
    owner = {byte: window for window in windows for byte in range(window.start, window.end)}
    parts = list(pieces(windows, offset, count))
    served = [(byte, window) for window, start, length in parts for byte in range(start, start + length)]
    assert [byte for byte, _ in served] == list(range(offset, offset + count))
    assert all(window is owner.get(byte) for byte, window in served)
    assert all(length > 0 for _, _, length in parts)
    assert all(a[0] is not b[0] for a, b in pairwise(parts)), "nothing is cut without need"
