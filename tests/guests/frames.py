"""A program for guests: checks what comes back through a network card that loops frames, byte for byte, with a raw socket.

    python3 frames.py exchange INTERFACE SIZE COUNT
    python3 frames.py watch INTERFACE SIZE COUNT

`exchange` sends frames of random bytes, at most 32 on their way at a time, and wants each of them back. `watch` checks those that
the kernel's pktgen sends: headers, length, zeros, and sequence numbers that grow; it says ``watching`` when pktgen may start.
Both end with a sentence and status 1 at the first frame that is wrong, or after 20 s without one.
It runs in the guest's Python and imports nothing of ours.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

#: For experiments (IEEE 802, local experimental ethertype 1).
_ETHERTYPE = 0x88B5
_IPV4 = 0x0800
_ADDRESSES = bytes.fromhex("020000000099020000000001")
#: Frames on their way at a time: fewer than the smallest ring has.
_WINDOW = 32
#: linux/if_packet.h: the level of packet sockets' options, and the one that hides what we send.
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
#: Where pktgen's own header is in an IPv4 frame (Ethernet, IP and UDP are before it), what it begins with, and its size.
_PKTGEN_AT, _PKTGEN_MAGIC, _PKTGEN_SIZE = 42, 0xBE9BE955, 16
_SECONDS = 20


class WrongFrameError(Exception):
    """A frame is not what was sent."""


def _open(interface: str, ethertype: int) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    raw.bind((interface, ethertype))
    raw.settimeout(_SECONDS)
    return raw


def exchange(interface: str, size: int, count: int) -> None:
    """Send `count` frames of `size` bytes and receive each of them once; several queues may change their order."""
    raw = _open(interface, _ETHERTYPE)
    header = _ADDRESSES + _ETHERTYPE.to_bytes(2, "big")
    away: set[bytes] = set()
    for _ in range(count):
        frame = header + os.urandom(size - len(header))
        away.add(frame)
        raw.send(frame)
        while len(away) >= _WINDOW:
            _receive(raw, away)
    while away:
        _receive(raw, away)


def _receive(raw: socket.socket, away: set[bytes]) -> None:
    frame = raw.recv(65536)
    if frame not in away:
        raise WrongFrameError(f"{len(frame)} bytes came that were not sent, or twice: {frame[:64].hex()}...")
    away.remove(frame)


def watch(interface: str, size: int, count: int) -> None:
    """Check `count` frames that pktgen made `size` bytes long."""
    raw = _open(interface, _IPV4)
    print("watching", flush=True)  # noqa: T201  # a program that whoever started it listens to
    last = -1
    for _ in range(count):
        last = check(raw.recv(65536), size, last)


def check(frame: bytes, size: int, last: int) -> int:
    """Return a frame's sequence number, which is greater than the `last` one's: some may have been missed."""
    if len(frame) != size:
        raise WrongFrameError(f"{len(frame)} bytes came instead of {size}: {frame[:64].hex()}...")
    length = struct.unpack_from("!H", frame, 16)[0]
    magic, sequence = struct.unpack_from("!II", frame, _PKTGEN_AT)
    rest = frame[_PKTGEN_AT + _PKTGEN_SIZE :]
    if length != size - 14 or magic != _PKTGEN_MAGIC or sequence <= last or rest.strip(b"\0"):
        raise WrongFrameError(f"after sequence number {last} came {frame.hex()}")
    return int(sequence)


def main() -> int:
    """See the module."""
    what, interface, size, count = sys.argv[1:]
    try:
        {"exchange": exchange, "watch": watch}[what](interface, int(size), int(count))
    except (WrongFrameError, OSError) as error:
        sys.stderr.write(f"{what} of {size} bytes: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
