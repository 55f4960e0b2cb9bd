"""Vendors' attributes as files, those with a folder in their name in that folder (`parent_attributes`, `device_attributes`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from mdevkit_service.sysfs import texts
from mdevkit_service.sysfs.nodes import File, Listing, Node

if TYPE_CHECKING:
    from mdevkit_service.schema import AttributeInfo

#: Reads the attribute of a name, or stores a value.
Access = Callable[[str, str | None], str]


def names(infos: Iterable[AttributeInfo]) -> list[str]:
    """Return the names of files and folders; what can be given at creation only is neither."""
    return list(dict.fromkeys(info.name.partition("/")[0] for info in infos if info.mode != "c"))


def find(infos: Iterable[AttributeInfo], access: Access, name: str) -> Node | None:
    """Return the file or the folder of that name."""
    below = f"{name}/"
    for info in infos:
        if info.name == name and info.mode != "c":
            return _file(info, access)
        if info.name.startswith(below):
            return _folder(infos, access, below)
    return None


def _folder(infos: Iterable[AttributeInfo], access: Access, prefix: str) -> Node | None:
    inside = {info.name.removeprefix(prefix): info for info in infos if info.name.startswith(prefix) and info.mode != "c"}
    if not inside:
        return None
    return Listing(lambda name: _file(inside[name], access) if name in inside else None, inside.keys)


def _file(info: AttributeInfo, access: Access) -> File:
    def store(data: bytes) -> None:
        access(info.name, texts.line(data))

    return File(partial(access, info.name, None) if "r" in info.mode else None, store if "w" in info.mode else None)
