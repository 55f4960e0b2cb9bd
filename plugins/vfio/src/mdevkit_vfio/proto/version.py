"""VERSION: the first message each way, with the JSON in which both sides say what they can do."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from mdevkit_vfio.proto.header import (
    MAX_DATA_XFER_SIZE,
    MAX_DMA_MAPS,
    MAX_MSG_FDS,
    MAX_PEER_MSG_FDS,
    PAGE_SIZE,
    U64_MAX,
    Buffer,
    Command,
    at_least,
    invalid,
)

_VERSION = struct.Struct("=HH")


@dataclass(frozen=True)
class Capabilities:
    """What one side can do, as its VERSION tells; the defaults are the specification's for a side that says nothing.

    `named` holds the names the sender gave, whether we know them or not: a reply may name no others.
    """

    max_msg_fds: int = 1
    max_data_xfer_size: int = MAX_DATA_XFER_SIZE
    max_dma_maps: int = 65535
    pgsizes: int = PAGE_SIZE
    write_multiple: bool = False
    migration_pgsize: int | None = None
    named: frozenset[str] = field(default=frozenset(), compare=False)

    def to_json(self, only: Iterable[str] | None = None) -> dict[str, Any]:
        """Return the capabilities object; `only` limits it to these names."""
        values: dict[str, Any] = {
            "max_msg_fds": self.max_msg_fds,
            "max_data_xfer_size": self.max_data_xfer_size,
            "max_dma_maps": self.max_dma_maps,
            "pgsizes": self.pgsizes,
            "write_multiple": self.write_multiple,
        }
        if self.migration_pgsize is not None:
            values["migration"] = {"pgsize": self.migration_pgsize}
        return values if only is None else {name: values[name] for name in values if name in set(only)}


#: What both ends of this package can do.
OURS: Final = Capabilities(
    max_msg_fds=MAX_MSG_FDS,
    max_data_xfer_size=MAX_DATA_XFER_SIZE,
    max_dma_maps=MAX_DMA_MAPS,
    pgsizes=PAGE_SIZE,
    write_multiple=True,
    migration_pgsize=PAGE_SIZE,
)


class Version(NamedTuple):
    """A VERSION message of either side."""

    major: int
    minor: int
    capabilities: Capabilities = Capabilities()

    def pack(self, only: Iterable[str] | None = None) -> bytes:
        """Return the payload. JSON is always there (cloud-hypervisor needs it) and ends in NUL (QEMU needs that)."""
        text = json.dumps({"capabilities": self.capabilities.to_json(only)})
        return _VERSION.pack(self.major, self.minor) + text.encode() + b"\0"

    @classmethod
    def parse(cls, payload: Buffer) -> Version:
        """Read a VERSION; EINVAL for text without NUL, broken JSON, and values of the wrong type or out of range."""
        at_least(Command.VERSION, payload, _VERSION.size)
        major, minor = _VERSION.unpack_from(payload)
        text = bytes(payload[_VERSION.size :])
        return cls(major, minor, _parse_capabilities(text) if text else Capabilities())


def _parse_capabilities(text: bytes) -> Capabilities:
    if text[-1] != 0:
        raise invalid(Command.VERSION, "the JSON text does not end in NUL")
    try:
        document = json.loads(text[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise invalid(Command.VERSION, f"the JSON text is broken: {type(error).__name__}: {error}") from None
    return _read_capabilities(_object(document, "version data").get("capabilities", {}))


def _read_capabilities(value: Any) -> Capabilities:
    given = _object(value, "capabilities")
    default = Capabilities()
    if not isinstance(given.get("write_multiple", False), bool):
        raise invalid(Command.VERSION, "write_multiple is not true or false")
    _object(given.get("twin_socket", {}), "twin_socket")
    return Capabilities(
        max_msg_fds=_number(given, "max_msg_fds", default.max_msg_fds, 0, MAX_PEER_MSG_FDS),
        max_data_xfer_size=_number(given, "max_data_xfer_size", default.max_data_xfer_size, 1),
        max_dma_maps=_number(given, "max_dma_maps", default.max_dma_maps, 0),
        pgsizes=_number(given, "pgsizes", default.pgsizes, 1),
        write_multiple=given.get("write_multiple", False),
        migration_pgsize=_migration_pgsize(given),
        named=frozenset(given),
    )


def _migration_pgsize(given: Mapping[str, Any]) -> int | None:
    if "migration" not in given:
        return None
    migration = _object(given["migration"], "migration")
    size = _number(migration, "pgsize", PAGE_SIZE, 1)
    if size & (size - 1):
        raise invalid(Command.VERSION, f"migration pgsize {size} is not a power of two")
    return size


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise invalid(Command.VERSION, f"{name} is not a JSON object")
    return value


def _number(values: Mapping[str, Any], name: str, default: int, low: int, high: int = U64_MAX) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise invalid(Command.VERSION, f"{name} {value!r:.40} is not a number from {low} to {high}")
    return value
