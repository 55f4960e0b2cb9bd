"""Flavour virtio: the whole stack in one process, virtio_mdev and virtio_net on top of the card's switch."""

from __future__ import annotations

import pytest
from mdevkit import Registry
from mdevkit_subfunction.driver import Mlx5SfDriver
from mdevkit_subfunction.parent import SubfunctionParent
from mdevkit_vdev.bus import VdevBus
from mdevkit_virtio.bus import VirtioMdevBus
from mdevkit_virtio.transport import VirtioMdevDriver
from mdevkit_virtio.virtio.bus import VirtioBus
from mdevkit_virtio.virtio.net import VirtioNetDriver

SECOND = 5.0
A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"


def address(text):
    return bytes.fromhex(text.replace(":", ""))


@pytest.fixture
def registry():
    plugins = [VirtioMdevBus(), VirtioBus(), VirtioMdevDriver(), VirtioNetDriver(), VdevBus(), Mlx5SfDriver(), SubfunctionParent()]
    with Registry(plugins) as registry:
        yield registry


def create(registry, tmp_path, flavour, mac):
    path = str(tmp_path / mac[-2:])
    return registry.create(f"subfunction-{flavour}", params={"hw_addr": mac}, endpoint_path=path)


def netdev(mdev):
    """The interface at the top: the device's own, or that of the virtio device below it."""
    children = list(mdev.children.values())
    return (children[0] if children else mdev).endpoint.netdev


@pytest.mark.parametrize("size", [60, 1514])
def test_frames_pass_through_the_switch(registry, tmp_path, size):
    first, second = (create(registry, tmp_path, "virtio", mac) for mac in (A, B))
    sent = [address(B) + address(A) + number.to_bytes(4, "big") + bytes(size - 16) for number in range(500)]
    with netdev(second).frames() as frames:
        for frame in sent:
            netdev(first).send(frame, timeout=SECOND)
        assert [frames.get(SECOND) for _ in sent] == sent
    assert netdev(first).mac == address(A)
    ports = registry.parent("0000:06:00.0").ops.eswitch.ports()
    assert [(port.representor.rx_packets, port.representor.tx_packets) for port in ports] == [(500, 0), (0, 500)]


def test_flavours_talk_to_one_another(registry, tmp_path):
    virtio, mlx5 = create(registry, tmp_path, "virtio", A), create(registry, tmp_path, "mlx5", B)
    frame = address(B) + address(A) + b"\x88\xb5" + bytes(100)
    netdev(virtio).send(frame, timeout=SECOND)
    assert netdev(mlx5).receive(SECOND) == frame
    answer = address(A) + address(B) + b"\x88\xb5" + bytes(200)
    with netdev(virtio).frames() as frames:
        assert netdev(mlx5).send(answer)
        assert frames.get(SECOND) == answer


def test_a_removed_device_leaves_no_thread(registry, tmp_path):
    import threading

    before = set(threading.enumerate())
    mdev = create(registry, tmp_path, "virtio", A)
    netdev(mdev).send(address(B) + address(A) + bytes(60), timeout=SECOND)
    registry.remove(mdev.uuid)
    assert set(threading.enumerate()) <= before
