"""What a user can see and set of a card and its ports.

Loaded to list types, so it is small: the model is imported when a device is created. `show` and `store` run on any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mdevkit.attributes import Attribute, Choice, Int, Kind, Text

if TYPE_CHECKING:
    from mdevkit.device import Mdev
    from mdevkit.parent import Parent

    from mdevkit_mtty.model import SerialDevice

#: Values of ``compat``.
NONE: Final = "none"
LINUX: Final = "linux"

#: Far ends; the last is followed by a path.
LOOPBACK: Final = "loopback"
PTY: Final = "pty"
UNIX: Final = "unix:"


class FarEnd(Kind[str]):
    """The text of a far end: ``loopback``, ``pty`` or ``unix:PATH``."""

    def parse(self, text: str) -> str:
        """See `Kind.parse`."""
        path = text.removeprefix(UNIX)
        if text in {LOOPBACK, PTY} or (text.startswith(UNIX) and path and path.isprintable()):
            return text
        raise ValueError(f"{LOOPBACK}, {PTY} or {UNIX}PATH is wanted, not {text!r}")


def _device(mdev: Mdev) -> SerialDevice:
    device: SerialDevice = mdev.drvdata
    return device


def _show_parent(parent: Parent) -> str:
    del parent
    return "This is phy device"


def _show_mdev(mdev: Mdev) -> str:
    return f"This is MDEV {mdev.uuid}"


PARENT_ATTRIBUTES: Final = (
    Attribute("mtty_dev/sample_mtty_dev", Text(), "The greeting of the Linux sample's parent.", show=_show_parent),
)

_COMPAT: Final = Attribute(
    "compat",
    Choice((NONE, LINUX)),
    "Whose mistakes to make: none (a 16550A that works), or linux (the sample's semantics, with which the stock driver hangs).",
    show=lambda mdev: _device(mdev).compat,
    create=True,
    default=NONE,
)
_GREETING: Final = Attribute("vendor/sample_mdev_dev", Text(), "The greeting of the Linux sample's devices.", show=_show_mdev)


def device_attributes(ports: int) -> tuple[Attribute[Any], ...]:
    """Return the attributes of a device with `ports` ports."""
    per_port = (attribute for port in range(ports) for attribute in _port_attributes(port))
    return (_COMPAT, *per_port, _GREETING)


def _port_attributes(port: int) -> tuple[Attribute[Any], ...]:
    name = f"port{port}"
    return (
        Attribute(
            name,
            FarEnd(),
            f"Far end of port {port}: {LOOPBACK}, {PTY}, or {UNIX}PATH, a socket that a program on the host connects to.",
            show=lambda mdev: _device(mdev).far_end(port),
            store=lambda mdev, spec: _device(mdev).set_far_end(port, spec),
            create=True,
            default=LOOPBACK,
        ),
        Attribute(
            f"{name}_path",
            Text(),
            f"What to open to talk to port {port}: the terminal or the socket; empty for {LOOPBACK}.",
            show=lambda mdev: _device(mdev).far_end_path(port),
        ),
        _counter(port, "tx", "Bytes the guest has sent through port {}."),
        _counter(port, "rx", "Bytes that have come in at port {}."),
        _counter(port, "overruns", "Bytes the guest wrote to port {} while its transmitter was full; they are lost."),
    )


def _counter(port: int, name: str, doc: str) -> Attribute[int]:
    def show(mdev: Mdev) -> int:
        value: int = getattr(_device(mdev).counters(port), name)
        return value

    return Attribute(f"port{port}_{name}", Int(), doc.format(port), show=show)
