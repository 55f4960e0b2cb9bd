"""What a user can see and set of a device.

Loaded to list types, so it is small: the model is imported when a device is created. `show` and `store` run on any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from mdevkit.attributes import Attribute, Choice, Int, Kind, Text
from mdevkit_virtio.address import Mac
from mdevkit_virtio.netspec import MAX_MTU, MIN_MTU

if TYPE_CHECKING:
    from mdevkit.device import Mdev
    from mdevkit.parent import Parent

    from mdevkit_mvnet.model import MvnetDevice

#: Values of ``compat``.
NONE: Final = "none"
LINUX: Final = "linux"

#: Values of ``policy``.
LOSSLESS: Final = "lossless"
DROP: Final = "drop"

#: Values of ``link``.
UP: Final = "up"
DOWN: Final = "down"

#: Queue pairs a device can have.
MAX_PAIRS: Final = 8


class Bits(Kind[int]):
    """A set of bits, shown in hexadecimal; only those of `allowed`."""

    def __init__(self, allowed: int) -> None:
        self._allowed: Final = allowed

    def parse(self, text: str) -> int:
        """See `Kind.parse`."""
        value = Int(0, 2**64 - 1).parse(text)
        if value & ~self._allowed:
            raise ValueError(f"bits {value & ~self._allowed:#x} are not among {self._allowed:#x}")
        return value

    def format(self, value: int) -> str:
        """See `Kind.format`."""
        return hex(value)


class PowerOfTwo(Kind[int]):
    """A power of two up to `high`."""

    def __init__(self, high: int) -> None:
        self._high: Final = high

    def parse(self, text: str) -> int:
        """See `Kind.parse`."""
        value = Int(1, self._high).parse(text)
        if value & (value - 1):
            raise ValueError(f"a power of two is wanted, not {value}")
        return value


class Counts(Kind[Sequence[int]]):
    """One number for each queue pair, with blanks between them."""

    def parse(self, text: str) -> Sequence[int]:
        """See `Kind.parse`."""
        return [Int().parse(word) for word in text.split()]

    def format(self, value: Sequence[int]) -> str:
        """See `Kind.format`."""
        return " ".join(str(number) for number in value)


def _device(mdev: Mdev) -> MvnetDevice:
    device: MvnetDevice = mdev.drvdata
    return device


def _show_parent(parent: Parent) -> str:
    del parent
    return ""


def _show_mdev(mdev: Mdev) -> str:
    return f"This is MDEV {mdev.uuid}"


PARENT_ATTRIBUTES: Final = (
    Attribute("mvnet_dev/sample_mvnet_dev", Text(), "An empty line, as the Linux sample's parent has it.", show=_show_parent),
)

#: Statistics, with a number for each queue pair. Receive and transmit are the guest's.
STATISTICS: Final = {
    "rx_packets": "Frames the guest has received.",
    "rx_bytes": "Bytes of those, without headers of the virtqueue.",
    "rx_kicks": "How often the guest has kicked its receive queue.",
    "rx_signals": "How often the guest was signalled for its receive queue.",
    "tx_packets": "Frames the guest has sent.",
    "tx_dropped": "Frames that were dropped for want of a receive buffer.",
    "tx_errors": "Frames that were dropped because they are malformed, or too large for the receive buffers.",
    "tx_kicks": "How often the guest has kicked its transmit queue.",
    "tx_signals": "How often the guest was signalled for its transmit queue.",
}


def device_attributes(queue_size: int, most_pairs: int, features: int, default_features: int) -> tuple[Attribute[Any], ...]:
    """Return the attributes of a type's devices: the default ring size, how many pairs, what can be and is offered."""
    return (
        *_identity(features, default_features),
        *_resources(queue_size, most_pairs),
        *_switches(),
        *(_statistic(name, doc) for name, doc in STATISTICS.items()),
        Attribute("vendor/sample_mdev_dev", Text(), "The greeting of the Linux sample's devices.", show=_show_mdev),
    )


def _identity(features: int, default_features: int) -> tuple[Attribute[Any], ...]:
    return (
        Attribute(
            "compat",
            Choice((NONE, LINUX)),
            "Whose mistakes to make: none, or linux (the series' sample, as far as a guest can tell).",
            show=lambda mdev: _device(mdev).compat,
            create=True,
            default=NONE,
        ),
        Attribute(
            "mac",
            Mac(),
            "The Ethernet address in the configuration; by default made from the UUID.",
            show=lambda mdev: _device(mdev).mac,
            create=True,
            default="",
        ),
        Attribute(
            "mtu",
            Int(MIN_MTU, MAX_MTU),
            "The MTU in the configuration.",
            show=lambda mdev: _device(mdev).mtu,
            create=True,
            default=1500,
        ),
        Attribute(
            "features",
            Bits(features),
            "The feature bits that are offered; with compat=linux always the sample's.",
            show=lambda mdev: _device(mdev).features,
            create=True,
            default=default_features,
        ),
    )


def _resources(queue_size: int, most_pairs: int) -> tuple[Attribute[Any], ...]:
    return (
        Attribute(
            "queues",
            Int(1, most_pairs),
            "Queue pairs; each has a data thread.",
            show=lambda mdev: _device(mdev).pairs,
            create=True,
            default=1,
        ),
        Attribute(
            "queue_size",
            PowerOfTwo(32768),
            "The largest ring a queue can have.",
            show=lambda mdev: _device(mdev).get_vq_num_max(0),
            create=True,
            default=queue_size,
        ),
        Attribute(
            "spin_us",
            Int(0, 1_000_000),
            "For how many microseconds a data thread polls without traffic before it sleeps.",
            show=lambda mdev: _device(mdev).spin_us,
            create=True,
            default=50,
        ),
        Attribute(
            "engine",
            Text(),
            "Which engine moves the frames: c or python.",
            show=lambda mdev: _device(mdev).engine.name,
        ),
        Attribute(
            "error",
            Text(),
            "Why the device needs a reset; empty if it does not.",
            show=lambda mdev: str(_device(mdev).error or ""),
        ),
    )


def _switches() -> tuple[Attribute[Any], ...]:
    return (
        Attribute(
            "policy",
            Choice((LOSSLESS, DROP)),
            f"What becomes of a frame without a receive buffer: {LOSSLESS} lets it wait, {DROP} drops it.",
            show=lambda mdev: _device(mdev).policy,
            store=lambda mdev, policy: _device(mdev).set_policy(policy),
            create=True,
            default=LOSSLESS,
        ),
        Attribute(
            "link",
            Choice((UP, DOWN)),
            "The cable: while it is down every frame is dropped, and a guest that looks at the status knows.",
            show=lambda mdev: _device(mdev).link,
            store=lambda mdev, link: _device(mdev).set_link(link),
            create=True,
            default=UP,
        ),
    )


def _statistic(name: str, doc: str) -> Attribute[Sequence[int]]:
    return Attribute(
        name,
        Counts(),
        f"{doc} One number for each queue pair.",
        show=lambda mdev: _device(mdev).statistic(name),
        counter=True,
    )
