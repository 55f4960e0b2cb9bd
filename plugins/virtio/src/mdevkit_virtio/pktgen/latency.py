"""A histogram of latencies in bounded memory: buckets that grow with what they count, as HdrHistogram's do.

A value is told to within 1/64 of itself. One thread at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

#: Buckets per power of two, as a number of bits.
_BITS: Final = 6


class Histogram:
    """Counts values of 0 and more; the unit is the caller's."""

    def __init__(self) -> None:
        self._buckets: Final[Counter[int]] = Counter()
        self.count = 0
        self.least = 0
        self.most = 0

    def add(self, value: int) -> None:
        """Count a value."""
        shift = max(value.bit_length() - _BITS - 1, 0)
        self._buckets[shift << _BITS + 1 | value >> shift] += 1
        self.least = min(self.least, value) if self.count else value
        self.most = max(self.most, value)
        self.count += 1

    def percentiles(self, wanted: Sequence[float]) -> list[int]:
        """Return the values below which those percentages of all are, in rising order; zeros while there is none."""
        found: list[int] = []
        below = 0
        for key in sorted(self._buckets):
            below += self._buckets[key]
            while len(found) < len(wanted) and below >= wanted[len(found)] / 100 * self.count:
                found.append(min(max(_middle(key), self.least), self.most))
        return found + [self.most] * (len(wanted) - len(found))


def _middle(key: int) -> int:
    shift, mantissa = key >> _BITS + 1, key & (1 << _BITS + 1) - 1
    return (mantissa << shift) + (1 << shift >> 1)
