"""What a user can see and set of any display here: whose mistakes it makes, and who may look at it.

Loaded to list types, so it is small: models and servers are imported when a device is created. `show` and `store`
run on any thread.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, Final

from mdevkit.attributes import Attribute, Bool, Choice, Kind, Text
from mdevkit.errors import shown

if TYPE_CHECKING:
    from mdevkit.device import Mdev

    from mdevkit_mbochs.display import DisplayDevice

DEVICE_API: Final = "vfio-pci"

#: Values of ``compat``.
NONE: Final = "none"
LINUX: Final = "linux"

#: Values of ``screen_socket`` and ``vnc``; the last two are followed by a path, and by [HOST:]PORT.
AUTO: Final = "auto"
OFF: Final = "none"
UNIX: Final = "unix:"
TCP: Final = "tcp:"
_LOOPBACK: Final = "127.0.0.1"


def parse_tcp(text: str) -> tuple[str, int]:
    """Return address and port of ``[HOST:]PORT``; ValueError for what is none, or not of this machine alone."""
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]") or _LOOPBACK)
        number = int(port)
    except ValueError:
        raise ValueError(f"[ADDRESS:]PORT is wanted, not {shown(text)}") from None
    if not address.is_loopback:
        raise ValueError(f"{address} can be reached from other machines: use {_LOOPBACK} and a tunnel (ssh -L)")
    if not 0 <= number <= 0xFFFF:
        raise ValueError(f"{number} is no port: 0 (any that is free) to 65535 are possible")
    return str(address), number


class SocketPath(Kind[str]):
    """``auto``, ``none`` or ``unix:PATH``."""

    def parse(self, text: str) -> str:
        """See `Kind.parse`."""
        if text in {AUTO, OFF} or _is_unix(text):
            return text
        raise ValueError(f"{AUTO}, {OFF} or {UNIX}PATH is wanted, not {shown(text)}")


class VncAddress(Kind[str]):
    """``none``, ``unix:PATH`` or ``tcp:[ADDRESS:]PORT``, the address one of this machine alone."""

    def parse(self, text: str) -> str:
        """See `Kind.parse`."""
        if text.startswith(TCP):
            parse_tcp(text.removeprefix(TCP))
        elif text != OFF and not _is_unix(text):
            raise ValueError(f"{OFF}, {UNIX}PATH or {TCP}[ADDRESS:]PORT is wanted, not {shown(text)}")
        return text


def _is_unix(text: str) -> bool:
    path = text.removeprefix(UNIX)
    return text.startswith(UNIX) and bool(path) and path.isprintable()


def display(mdev: Mdev) -> DisplayDevice:
    """Return the model of a device."""
    device: DisplayDevice = mdev.drvdata
    return device


COMPAT: Final = Attribute(
    "compat",
    Choice((NONE, LINUX)),
    "Whose mistakes to make: none, or linux (the Linux sample's, for tools that were written against it).",
    show=lambda mdev: display(mdev).compat,
    create=True,
    default=NONE,
)

#: Of every display, whichever card.
LOOKING: Final[tuple[Attribute[Any], ...]] = (
    Attribute(
        "screen_socket",
        SocketPath(),
        f"Where `mdevkit screenshot` gets the picture: {AUTO} (beside the device's socket), {UNIX}PATH, or {OFF}.",
        show=lambda mdev: display(mdev).onlookers.screen_socket,
        create=True,
        default=AUTO,
    ),
    Attribute(
        "screen_path",
        Text(),
        "The socket the picture is to be had from; empty if there is none.",
        show=lambda mdev: display(mdev).onlookers.screen_path,
    ),
    Attribute(
        "vnc",
        VncAddress(),
        f"Where VNC viewers are served: {OFF}, {UNIX}PATH, or {TCP}[ADDRESS:]PORT with an address of this machine alone.",
        show=lambda mdev: display(mdev).onlookers.vnc,
        store=lambda mdev, value: display(mdev).onlookers.set_vnc(vnc=value),
        create=True,
        default=OFF,
    ),
    Attribute(
        "vnc_address",
        Text(),
        "What to give to a VNC viewer: the path of a socket, or address and port; empty if there is none.",
        show=lambda mdev: display(mdev).onlookers.vnc_address,
    ),
    Attribute(
        "vnc_password_file",
        Text(),
        "A file of yours that nobody else can read, whose first line is the viewers' password (VNC uses 8 characters of it).",
        show=lambda mdev: display(mdev).onlookers.vnc_password_file,
        store=lambda mdev, value: display(mdev).onlookers.set_vnc(password_file=value),
        create=True,
        default="",
    ),
    Attribute(
        "vnc_insecure",
        Bool(),
        "Whether every user of this machine may look through a TCP port without a password.",
        show=lambda mdev: display(mdev).onlookers.vnc_insecure,
        store=lambda mdev, value: display(mdev).onlookers.set_vnc(insecure=value),
        create=True,
        default=False,
    ),
)
