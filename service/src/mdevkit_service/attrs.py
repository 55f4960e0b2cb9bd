"""A definition's attributes against those a device has: which are given when it is made, which are stored later, which differ.

A definition's are an ordered list in which a name may come several times (mdevctl writes one after the other); a device's are
declared by its type. Plain functions.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mdevkit.attributes import Bool, Int
from mdevkit.errors import MdevError

_READ: Final[dict[str, Callable[[str], Any]]] = {"int": Int(-(2**64), 2**64).parse, "bool": Bool().parse}

Facts = Mapping[str, Mapping[str, Any]]


def split(attrs: Sequence[Mapping[str, str]], facts: Facts) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return what to give when the device is made, and what to store afterwards, in order.

    What can only be given then can be given once: EINVAL. An attribute that is not declared goes with the first, so that it is
    refused before anything is made.
    """
    pairs = [pair for attribute in attrs for pair in attribute.items()]
    count = Counter(name for name, _ in pairs)
    first: dict[str, str] = {}
    later: list[tuple[str, str]] = []
    for name, value in pairs:
        known = facts.get(name)
        if known is not None and not known["create"]:
            later.append((name, value))
        elif name not in first:
            first[name] = value
        elif known is not None and "w" in known["mode"]:
            later.append((name, value))
        else:
            raise MdevError(errno.EINVAL, f"attribute {name} is given {count[name]} times, and cannot be changed once it is set")
    return first, later


def compare(attrs: Sequence[Mapping[str, str]], running: Mapping[str, str], facts: Facts) -> dict[str, dict[str, str]]:
    """Return the attributes of a running device that differ from those defined, as far as they can be read."""
    wanted = {name: value for attribute in attrs for name, value in attribute.items()}
    return {
        name: {"defined": value, "running": running[name]}
        for name, value in wanted.items()
        if name in running and not _same(value, running[name], facts.get(name, {}).get("kind", ""))
    }


def _same(one: str, other: str, kind: str) -> bool:
    """Tell whether two texts mean the same value."""
    if one == other:
        return True
    try:
        return kind in _READ and bool(_READ[kind](one) == _READ[kind](other))
    except ValueError:
        return False
