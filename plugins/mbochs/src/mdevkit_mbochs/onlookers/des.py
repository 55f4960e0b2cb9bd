"""DES (FIPS 46-3) of single blocks, for VNC authentication and nothing else.

VNC's challenge is encrypted with DES, which well-kept libraries no longer offer (cryptography has dropped it). What it protects is
weak by design: 56 bits, 8 characters of a password, pictures in the clear. Two blocks are encrypted per log-in, so it need not be
fast either: here it is as the standard writes it, bit by bit, with the standard's tables. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

BLOCK: Final = 8

# fmt: off
#: Where each bit comes from; a block's first bit is number 1.
_INITIAL: Final = (
    58, 50, 42, 34, 26, 18, 10, 2, 60, 52, 44, 36, 28, 20, 12, 4, 62, 54, 46, 38, 30, 22, 14, 6, 64, 56, 48, 40, 32, 24, 16, 8,
    57, 49, 41, 33, 25, 17, 9, 1, 59, 51, 43, 35, 27, 19, 11, 3, 61, 53, 45, 37, 29, 21, 13, 5, 63, 55, 47, 39, 31, 23, 15, 7,
)
_FINAL: Final = tuple(_INITIAL.index(bit) + 1 for bit in range(1, 65))
_EXPANSION: Final = (
    32, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 8, 9, 10, 11, 12, 13, 12, 13, 14, 15, 16, 17,
    16, 17, 18, 19, 20, 21, 20, 21, 22, 23, 24, 25, 24, 25, 26, 27, 28, 29, 28, 29, 30, 31, 32, 1,
)
_PERMUTATION: Final = (
    16, 7, 20, 21, 29, 12, 28, 17, 1, 15, 23, 26, 5, 18, 31, 10, 2, 8, 24, 14, 32, 27, 3, 9, 19, 13, 30, 6, 22, 11, 4, 25,
)
_CHOICE_1: Final = (
    57, 49, 41, 33, 25, 17, 9, 1, 58, 50, 42, 34, 26, 18, 10, 2, 59, 51, 43, 35, 27, 19, 11, 3, 60, 52, 44, 36,
    63, 55, 47, 39, 31, 23, 15, 7, 62, 54, 46, 38, 30, 22, 14, 6, 61, 53, 45, 37, 29, 21, 13, 5, 28, 20, 12, 4,
)
_CHOICE_2: Final = (
    14, 17, 11, 24, 1, 5, 3, 28, 15, 6, 21, 10, 23, 19, 12, 4, 26, 8, 16, 7, 27, 20, 13, 2,
    41, 52, 31, 37, 47, 55, 30, 40, 51, 45, 33, 48, 44, 49, 39, 56, 34, 53, 46, 42, 50, 36, 29, 32,
)
_SHIFTS: Final = (1, 1, 2, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 1)
#: The selection functions S1 to S8, row after row, a hexadecimal digit for each of 16 columns.
_SELECTION: Final = (
    "e4d12fb83a6c59070f74e2d1a6cb953841e8d62bfc973a50fc8249175b3ea06d",
    "f18e6b34972dc05a3d47f28ec01a69b50e7ba4d158c6932fd8a13f42b67c05e9",
    "a09e63f51dc7b428d709346a285ecbf1d6498f30b12c5ae71ad069874fe3b52c",
    "7de3069a1285bc4fd8b56f03472c1ae9a690cb7df13e52843f06a1d8945bc72e",
    "2c417ab6853fd0e9eb2c47d150fa3986421bad78f9c5630eb8c71e2d6f09a453",
    "c1af92680d34e75baf427c9561de0b389ef528c3704a1db6432c95fabe17608d",
    "4b2ef08d3c975a61d0b7491ae35c2f8614bdc37eaf6805926bd814a7950fe23c",
    "d2846fb1a93e50c71fd8a374c56b0e927b419ce206adf35821e74a8dfc90356b",
)
# fmt: on

_Bits = list[int]


def encrypt(key: bytes, block: bytes) -> bytes:
    """Return `block` encrypted with `key`, 8 bytes each; the lowest bit of each byte of the key does not count."""
    bits = _pick(_bits(block), _INITIAL)
    left, right = bits[:32], bits[32:]
    for round_key in _schedule(key):
        left, right = right, _xor(left, _mangle(right, round_key))
    return _bytes(_pick(right + left, _FINAL))


def _schedule(key: bytes) -> Iterable[_Bits]:
    bits = _pick(_bits(key), _CHOICE_1)
    left, right = bits[:28], bits[28:]
    for shift in _SHIFTS:
        left, right = left[shift:] + left[:shift], right[shift:] + right[:shift]
        yield _pick(left + right, _CHOICE_2)


def _mangle(half: _Bits, round_key: _Bits) -> _Bits:
    mixed = _xor(_pick(half, _EXPANSION), round_key)
    found: _Bits = []
    for number, table in enumerate(_SELECTION):
        first, *column, last = mixed[6 * number : 6 * number + 6]
        digit = table[(first * 2 + last) * 16 + int("".join(map(str, column)), 2)]
        found += map(int, f"{int(digit, 16):04b}")
    return _pick(found, _PERMUTATION)


def _pick(bits: _Bits, places: Sequence[int]) -> _Bits:
    return [bits[place - 1] for place in places]


def _xor(one: _Bits, other: _Bits) -> _Bits:
    return [a ^ b for a, b in zip(one, other, strict=True)]


def _bits(data: bytes) -> _Bits:
    return [int(bit) for byte in data for bit in f"{byte:08b}"]


def _bytes(bits: _Bits) -> bytes:
    return int("".join(map(str, bits)), 2).to_bytes(BLOCK, "big")
