"""Run in a network namespace of its own: pings a neighbour that is a loop, and compares what went out with what came back.

    unshare -n python tests/tap_ping.py process|command

``process`` connects the TAP with a netdev of this process; ``command`` runs ``mdevkit run`` and ``mdevkit tap``.
Prints what it has seen as JSON.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from mdevkit import Registry
from mdevkit_virtio.virtio.tap import Tap, TapPort

MDEVKIT = Path(sys.executable).with_name("mdevkit")
UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a0aa"
NAME = "tap0"
NEIGHBOUR = "10.99.0.2"
PATIENCE = 20
ETH_P_ALL = 3
PACKET_OUTGOING = 4


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def set_up_network():
    Path(f"/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6").write_text("1")
    ip("address", "add", "10.99.0.1/24", "dev", NAME)
    ip("neighbour", "add", NEIGHBOUR, "lladdr", "02:00:00:00:00:99", "dev", NAME, "nud", "permanent")


@contextlib.contextmanager
def in_this_process():
    with Registry.discover() as registry:
        mdev = registry.create("mvnet_loopback-virtio")
        netdev = mdev.endpoint.device.endpoint.netdev
        tap = Tap.open(NAME)
        tap.set_up(netdev.mtu)
        port = TapPort(netdev, tap)
        yield
        port.close()


@contextlib.contextmanager
def by_the_command():
    with contextlib.ExitStack() as undo:
        for words, ready in (("run", "mvnet_loopback-virtio", "--uuid", UUID), "serving"), (("tap", UUID, NAME), "is connected"):
            process = subprocess.Popen([MDEVKIT, *words], stdout=subprocess.PIPE, text=True)
            undo.callback(end, process)
            line = next((line for line in process.stdout if ready in line), None)
            assert line is not None, f"mdevkit {words} has ended"
        yield


def end(process):
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0, f"it ended with {process.returncode}"


def echo_request(number, size):
    payload = bytes((number + i) % 251 for i in range(size))
    header = struct.pack("!BBHHH", 8, 0, 0, 77, number)
    words = struct.unpack(f"!{(8 + size + size % 2) // 2}H", header + payload + b"\0" * (size % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header[:2] + struct.pack("!H", ~total & 0xFFFF) + header[4:] + payload


def ping_all(sizes):
    """Ping with every size and return the frames that went out and those that came back, as a packet socket saw them."""
    out, back = [], []
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sniffer,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pinger,
    ):
        sniffer.bind((NAME, ETH_P_ALL))
        for number, size in enumerate(sizes):
            pinger.sendto(echo_request(number, size), (NEIGHBOUR, 0))
            deadline = time.monotonic() + PATIENCE
            while len(back) <= number and select.select([sniffer], [], [], max(0, deadline - time.monotonic()))[0]:
                frame, address = sniffer.recvfrom(65536)
                (out if address[2] == PACKET_OUTGOING else back).append(frame)
    return out, back


def main():
    with {"process": in_this_process, "command": by_the_command}[sys.argv[1]]():
        set_up_network()
        sizes = [56] * 100 + list(range(0, 1473, 23))
        out, back = ping_all(sizes)
    sys.stdout.write(json.dumps({"pings": len(sizes), "out": len(out), "back": len(back), "equal": out == back}) + "\n")


if __name__ == "__main__":
    main()
