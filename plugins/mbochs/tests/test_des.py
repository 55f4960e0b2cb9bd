"""DES against published vectors: the worked example of FIPS 46 tutorials, and NBS Special Publication 500-20."""

from __future__ import annotations

import pytest
from mdevkit_mbochs.onlookers.des import encrypt

VECTORS = [
    ("133457799bbcdff1", "0123456789abcdef", "85e813540f0ab405"),
    ("0101010101010101", "95f8a5e5dd31d900", "8000000000000000"),
    ("0101010101010101", "dd7f121ca5015619", "4000000000000000"),
    ("8001010101010101", "0000000000000000", "95a8d72813daa94d"),
    ("4001010101010101", "0000000000000000", "0eec1487dd8c26d5"),
    ("1046913489980131", "0000000000000000", "88d55e54f54c97b4"),
    ("7ca110454a1a6e57", "01a1d6d039776742", "690f5b0d9a26939b"),
    ("0131d9619dc1376e", "5cd54ca83def57da", "7a389d10354bd271"),
    ("07a1133e4a0b2686", "0248d43806f67172", "868ebb51cab4599a"),
]


@pytest.mark.parametrize(("key", "plain", "cipher"), VECTORS)
def test_vectors(key: str, plain: str, cipher: str):
    assert encrypt(bytes.fromhex(key), bytes.fromhex(plain)).hex() == cipher
