"""Tells libudev's listeners, libvirt among them, of devices, as udevd does after it has dealt with a device of the kernel's.

The message is multicast on the netlink family of uevents to the group of udevd's own messages. The kernel lets root alone send
there, and libudev believes root alone. It reaches every listener of the network namespace, so it is asked for (``--udev``).
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit_service.sysfs.tree import System

log = logging.getLogger("mdevkit.sysfs")

#: linux/netlink.h; the groups are libudev's: 1 for the kernel's messages, 2 for udevd's.
_NETLINK_KOBJECT_UEVENT: Final = 15
_GROUP_UDEV: Final = 2

#: The header of libudev's messages (systemd, src/libsystemd/sd-device/device-monitor.c): prefix, magic, size of the header,
#: offset and length of the properties, then what socket filters look at: hashes of subsystem and devtype, a bloom filter of tags.
_HEADER: Final = struct.Struct("=8s4sIII4s4s8s")
_MAGIC: Final = (0xFEEDCAFE).to_bytes(4, "big")


class Announcer:
    """A socket to send from; EPERM for whoever is not root of the network namespace. Any thread may call."""

    def __init__(self) -> None:
        self._socket: Final = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT)
        if os.geteuid() != 0:
            self._socket.close()
            raise MdevError(errno.EPERM, "only root can tell libudev's listeners of devices (--udev)")
        self._socket.bind((0, 0))
        #: Listeners put events in order by the kernel's numbers; ours are later than those of this boot.
        self._number = time.time_ns() // 1000

    def __call__(self, path: str, subsystem: str, action: str, variables: dict[str, str]) -> None:
        """Tell of the device at `path`, which is seen from the root of sysfs."""
        self._number += 1
        properties = {
            "ACTION": action,
            "DEVPATH": path,
            "SUBSYSTEM": subsystem,
            "SEQNUM": str(self._number),
            "USEC_INITIALIZED": str(time.monotonic_ns() // 1000),
            **variables,
        }
        try:
            self._socket.sendto(message(subsystem, properties), (0, _GROUP_UDEV))
        except ConnectionRefusedError:
            log.debug("nobody listens for %s of %s", action, path)
        except OSError as error:
            log.error("%s of %s cannot be told: %s", action, path, error.strerror)


def message(subsystem: str, properties: dict[str, str]) -> bytes:
    """Return the message with these properties."""
    body = b"".join(f"{name}={value}\0".encode() for name, value in properties.items())
    size = _HEADER.size
    hashed = murmur2(subsystem.encode()).to_bytes(4, "big")
    return _HEADER.pack(b"libudev", _MAGIC, size, size, len(body), hashed, bytes(4), bytes(8)) + body


def murmur2(data: bytes) -> int:
    """Return the 32-bit MurmurHash2 (Austin Appleby) of `data` with seed 0, which libudev's socket filters look at."""
    mixer, mask = 0x5BD1E995, 0xFFFFFFFF
    value = len(data)
    whole = len(data) & ~3
    for (word,) in struct.iter_unpack("<I", data[:whole]):
        word = word * mixer & mask
        word = (word ^ word >> 24) * mixer & mask
        value = (value * mixer & mask) ^ word
    if rest := data[whole:]:
        value = (value ^ int.from_bytes(rest, "little")) * mixer & mask
    value = (value ^ value >> 13) * mixer & mask
    return value ^ value >> 15


class Herald:
    """Turns the service's events of devices into udev's; the follower's thread calls it."""

    def __init__(self, system: System, announcer: Announcer) -> None:
        self._system: Final = system
        self._announcer: Final = announcer

    def __call__(self, event: dict[str, Any]) -> None:
        """Tell of an event, if it is one of a device."""
        variables = event["env"]
        if "MDEV_PARENT" not in variables:
            return
        try:
            parent = self._system.view.parents().get(variables["MDEV_PARENT"])
        except MdevError as error:
            log.error("%s of %s cannot be told: %s", event["action"], event["subject"], error)
            return
        if parent is not None:
            path = f"{self._system.places.folder(parent)}/{event['subject']}"
            self._announcer(path, "mdev", event["action"], told(variables))


def told(variables: dict[str, str]) -> dict[str, str]:
    """Return the variables without line breaks and zeros, which a message of theirs cannot hold."""
    return {name: value.replace("\0", " ").replace("\n", " ") for name, value in variables.items()}
