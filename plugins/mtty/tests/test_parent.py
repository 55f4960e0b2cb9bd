"""The parent in a registry: types, pool, attributes, and what a failed create leaves."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mdevkit import Mdev, MdevError, Registry
from mdevkit.sockets import listen_at
from mdevkit_mtty.model import MttyDevice, SampleDevice
from mdevkit_mtty.parent import MttyParent
from mdevkit_vfio.bus import VfioBus, VfioMdev

UUID = "00000000-0000-4000-8000-00000000000a"


@pytest.fixture
def registry(no_leaks: None) -> Iterator[Registry]:
    with Registry() as registry:
        registry.register_bus(VfioBus())
        registry.register_parent(MttyParent())
        yield registry


def create(registry: Registry, type_id: str = "mtty-2", **params: Any) -> Mdev:
    return registry.create(type_id, params=params, bind=False)


def ops(mdev: Mdev) -> Any:
    return VfioMdev.from_device(mdev).get_ops()


def test_types_are_the_samples(registry: Registry):
    shown = [(type_.id, type_.name, type_.description, type_.device_api, type_.available_instances) for type_ in registry.types]
    assert shown == [
        ("mtty-1", "Single port serial", "", "vfio-pci", 24),
        ("mtty-2", "Dual port serial", "", "vfio-pci", 12),
    ]
    assert registry.parent("mtty").get_attribute("mtty_dev/sample_mtty_dev") == "This is phy device"


def test_both_types_take_from_one_pool(registry: Registry):
    devices = [create(registry, "mtty-2") for _ in range(11)]
    devices.append(create(registry, "mtty-1"))
    assert [type_.available_instances for type_ in registry.types] == [1, 0]
    with pytest.raises(MdevError, match="2 of 24 ports wanted, 1 free") as caught:
        create(registry, "mtty-2")
    assert caught.value.errno == errno.ENOSPC
    registry.remove(devices[0].uuid)
    assert [type_.available_instances for type_ in registry.types] == [3, 1]


def test_many_creates_at_once_get_exactly_the_ports_there_are(registry: Registry):
    results: list[object] = []

    def attempt() -> None:
        try:
            results.append(create(registry, "mtty-1", port0="pty"))
        except MdevError as error:
            results.append(error.errno)

    threads = [threading.Thread(target=attempt) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.mdevs) == 24
    assert results.count(errno.ENOSPC) == 16


def test_attributes_of_a_device(registry: Registry):
    mdev = registry.create("mtty-1", uuid=UUID, bind=False)
    assert mdev.type.device_table.read_all(mdev) == {
        "compat": "none",
        "port0": "loopback",
        "port0_path": "",
        "port0_tx": "0",
        "port0_rx": "0",
        "port0_overruns": "0",
        "vendor/sample_mdev_dev": f"This is MDEV {UUID}",
    }
    assert "port1" in create(registry, "mtty-2").type.device_table
    with pytest.raises(MdevError, match="has no attribute 'port1'"):
        create(registry, "mtty-1", port1="pty")


def test_counters_count(registry: Registry):
    mdev = create(registry)
    device = ops(mdev)
    for _ in range(3):
        device.write(1, 0, b"x")
    assert [mdev.get_attribute(f"port1_{name}") for name in ("tx", "rx", "overruns")] == [1, 1, 1]
    device.read(1, 0, 1)
    assert [mdev.get_attribute(f"port1_{name}") for name in ("tx", "rx", "overruns")] == [2, 2, 1]
    assert [mdev.get_attribute(f"port0_{name}") for name in ("tx", "rx", "overruns")] == [0, 0, 0]


def test_compat_selects_the_model(registry: Registry):
    assert isinstance(ops(create(registry)), MttyDevice)
    mdev = create(registry, compat="linux")
    assert isinstance(ops(mdev), SampleDevice)
    assert mdev.get_attribute("compat") == "linux"
    with pytest.raises(MdevError, match=r"attribute compat of device [-0-9a-f]* is read-only"):
        mdev.set_attribute("compat", "none")


def test_far_ends_at_creation_and_later(registry: Registry, tmp_path: Path):
    mdev = create(registry, port0="pty", port1=f"unix:{tmp_path}/p1")
    terminal, path = mdev.get_attribute("port0_path"), mdev.get_attribute("port1_path")
    assert Path(terminal).is_char_device()
    assert path == f"{tmp_path}/p1"
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
    mdev.set_attribute("port1", "pty")
    assert not Path(path).exists()
    assert mdev.get_attribute("port1") == "pty"
    mdev.set_attribute("port0", f"unix:{path}")
    assert Path(path).is_socket()
    registry.remove(mdev.uuid)
    assert not Path(path).exists()


BAD = [
    ({"port0": "tcp"}, errno.EINVAL, "attribute port0: loopback, pty or unix:PATH is wanted, not 'tcp'"),
    ({"port0": "unix:"}, errno.EINVAL, "attribute port0: loopback, pty or unix:PATH is wanted, not 'unix:'"),
    ({"port0": "unix:/tmp/a\nb"}, errno.EINVAL, "attribute port0: loopback, pty or unix:PATH is wanted, not 'unix:/tmp/a\\nb'"),
    ({"compat": "windows"}, errno.EINVAL, "attribute compat: one of none, linux is wanted, not 'windows'"),
    ({"port1": "unix:/nowhere/p"}, errno.ENOENT, "cannot listen at /nowhere/p: the folder /nowhere does not exist"),
    ({"compat": "linux", "port1": "pty"}, errno.EINVAL, "port 1 of a device with compat=linux is always loopback, not pty"),
]


@pytest.mark.parametrize(("params", "number", "text"), BAD)
def test_a_refused_create_says_why_and_leaves_nothing(
    registry: Registry, tmp_path: Path, params: dict[str, str], number: int, text: str
):
    with pytest.raises(MdevError) as caught:
        create(registry, **{"port0": f"unix:{tmp_path}/p0" if "compat" not in params else "loopback"} | params)
    assert caught.value.errno == number
    assert str(caught.value).endswith(text)
    assert registry.mdevs == []
    assert list(tmp_path.iterdir()) == []
    assert registry.type("mtty-1").available_instances == 24


def test_the_same_socket_twice_in_one_create(registry: Registry, tmp_path: Path):
    path = f"{tmp_path}/p"
    with pytest.raises(MdevError, match=f"{path} is taken"):
        create(registry, port0=f"unix:{path}", port1=f"unix:{path}")
    assert list(tmp_path.iterdir()) == []


def test_sockets_are_made_by_the_devices_listen(registry: Registry, tmp_path: Path):
    asked = []

    def listen(path: str) -> socket.socket:
        asked.append(path)
        return listen_at(path)

    registry.listen = listen
    mdev = create(registry, port0=f"unix:{tmp_path}/p0")
    mdev.set_attribute("port1", f"unix:{tmp_path}/p1")
    assert asked == [f"{tmp_path}/p0", f"{tmp_path}/p1"]


def test_leaving_the_registry_closes_every_far_end(no_leaks: None, tmp_path: Path):
    with Registry() as registry:
        registry.register_bus(VfioBus())
        registry.register_parent(MttyParent())
        for number in range(5):
            create(registry, port0="pty", port1=f"unix:{tmp_path}/{number}")
        assert len(list(tmp_path.iterdir())) == 5
    assert list(tmp_path.iterdir()) == []


def test_listing_types_loads_no_model():
    """`mdevkit types` shall not pay for what only a device needs."""
    code = (
        "import sys; from mdevkit_mtty.parent import MttyParent; MttyParent();"
        "print(sys.modules.keys() & {'mdevkit_mtty.model', 'mdevkit_mtty.farend', 'mdevkit_vfio.pci', 'ctypes'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
