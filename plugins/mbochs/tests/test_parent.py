"""Both parents in a registry: types, budgets, attributes, and what a failed create leaves."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mdevkit import Mdev, MdevError, Registry
from mdevkit_mbochs.mbochs.model import MbochsDevice, SampleMbochs
from mdevkit_vfio.bus import VfioMdev


def test_types_are_the_samples(registry: Registry):
    shown = [(type_.id, type_.name, type_.description, type_.device_api, type_.available_instances) for type_ in registry.types]
    assert shown == [
        ("mbochs-small", "mbochs-small", "virtual display, 4 MB video memory", "vfio-pci", 64),
        ("mbochs-medium", "mbochs-medium", "virtual display, 16 MB video memory", "vfio-pci", 16),
        ("mbochs-large", "mbochs-large", "virtual display, 64 MB video memory", "vfio-pci", 4),
        ("mdpy-vga", "mdpy-vga", "virtual display, 640x480 framebuffer", "vfio-pci", 4),
        ("mdpy-xga", "mdpy-xga", "virtual display, 1024x768 framebuffer", "vfio-pci", 4),
        ("mdpy-hd", "mdpy-hd", "virtual display, 1920x1080 framebuffer", "vfio-pci", 4),
    ]


def test_mbochs_types_share_megabytes(registry: Registry, create: Callable[..., Mdev]):
    def available() -> list[int]:
        return [registry.type(f"mbochs-{group}").available_instances for group in ("small", "medium", "large")]

    large = [create("mbochs-large") for _ in range(3)]
    create("mbochs-medium")
    small = create("mbochs-small")
    assert available() == [11, 2, 0]
    with pytest.raises(
        MdevError, match=rf"64 of 256 megabytes wanted, 44 free \({large[0].name} holds 64, .* 1 more devices"
    ) as caught:
        create("mbochs-large")
    assert caught.value.errno == errno.ENOSPC
    registry.remove(small.uuid)
    assert available() == [12, 3, 0]


def test_mdpy_types_share_four_displays(registry: Registry, create: Callable[..., Mdev]):
    for type_id in ("mdpy-vga", "mdpy-xga", "mdpy-hd", "mdpy-vga"):
        create(type_id)
    assert [registry.type(f"mdpy-{group}").available_instances for group in ("vga", "xga", "hd")] == [0, 0, 0]
    with pytest.raises(MdevError, match="1 of 4 displays wanted, 0 free"):
        create("mdpy-hd")


def test_attributes_of_mbochs(create: Callable[..., Mdev], runtime_folder: Path):
    mdev = create("mbochs-medium", serial="7")
    shown = mdev.type.device_table.read_all(mdev)
    assert len(shown.pop("edid")) == 256
    assert shown == {
        "compat": "none",
        "vendor/memory": "16 MB",
        "resolution": "1024x768",
        "monitor": "mbochs",
        "serial": "7",
        "screen_socket": "auto",
        "screen_path": f"{runtime_folder}/mdevkit/{mdev.name}.screen",
        "vnc": "none",
        "vnc_address": "",
        "vnc_password_file": "",
        "vnc_insecure": "0",
    }


def test_attributes_of_mdpy(create: Callable[..., Mdev]):
    shown = create("mdpy-hd").type.device_table
    assert "edid" not in shown
    assert create("mdpy-hd", screen_socket="none").get_attribute("screen_path") == ""
    assert create("mdpy-xga").get_attribute("vendor/resolution") == "1024x768"


def test_compat_selects_the_model(create: Callable[..., Mdev]):
    assert type(VfioMdev.from_device(create()).get_ops()) is MbochsDevice
    mdev = create(compat="linux")
    assert type(VfioMdev.from_device(mdev).get_ops()) is SampleMbochs
    assert (mdev.get_attribute("compat"), mdev.get_attribute("edid")) == ("linux", "none")


BAD = [
    ({"resolution": "big"}, "attribute resolution: WIDTHxHEIGHT is wanted, not 'big'"),
    ({"resolution": "800x601"}, "attribute resolution: 800x601 is not between 64x64 and 800x600"),
    ({"resolution": "63x64"}, "attribute resolution: 63x64 is not between 64x64 and 800x600"),
    ({"monitor": "12345678901234"}, "attribute monitor: 1 to 13 characters of ASCII is wanted, not '12345678901234'"),
    ({"serial": "-1"}, "attribute serial: -1 is not between 0 and 4294967295"),
    ({"edid": "xyz"}, "attribute edid: auto, none or hexadecimal digits are wanted, not 'xyz'"),
    ({"edid": "00"}, "EDID has blocks of 128 bytes, here up to 8; these are 1 bytes"),
    ({"screen_socket": "pty"}, "attribute screen_socket: auto, none or unix:PATH is wanted, not 'pty'"),
    ({"screen_socket": "unix:/nowhere/s"}, "cannot listen at /nowhere/s: the folder /nowhere does not exist"),
    ({"vnc": "yes"}, "attribute vnc: none, unix:PATH or tcp:[ADDRESS:]PORT is wanted, not 'yes'"),
    ({"vnc": "tcp:x"}, "attribute vnc: [ADDRESS:]PORT is wanted, not 'x'"),
    ({"vnc": "tcp:70000"}, "attribute vnc: 70000 is no port: 0 (any that is free) to 65535 are possible"),
    ({"vnc": "tcp:0.0.0.0:5900"}, "0.0.0.0 can be reached from other machines: use 127.0.0.1 and a tunnel (ssh -L)"),
    ({"vnc": "tcp:[::]:5900"}, ":: can be reached from other machines: use 127.0.0.1 and a tunnel (ssh -L)"),
    (
        {"vnc": "tcp:0"},
        "vnc=tcp:0 lets every user of this machine look: it needs vnc_password_file=PATH, or vnc_insecure=yes; "
        "vnc=unix:PATH is yours alone",
    ),
    ({"vnc_password_file": "/nowhere/p"}, "the password file /nowhere/p cannot be read: No such file or directory"),
    ({"vnc": "unix:/nowhere/v"}, "cannot listen at /nowhere/v: the folder /nowhere does not exist"),
]


@pytest.mark.parametrize(("params", "text"), BAD)
def test_a_refused_create_says_why_and_leaves_nothing(
    registry: Registry, create: Callable[..., Mdev], params: dict[str, str], text: str
):
    with pytest.raises(MdevError) as caught:
        create(**params)
    assert str(caught.value).endswith(text)
    assert registry.mdevs == []
    assert registry.type("mbochs-small").available_instances == 64


@pytest.mark.parametrize("text", ["4096x64", "4095x5000"])
def test_edid_has_twelve_bits(create: Callable[..., Mdev], text: str):
    with pytest.raises(MdevError, match=f"{text} is not between 64x64 and 4095x4095"):
        create("mbochs-large", resolution=text)


def test_a_resolution_fits_the_memory(create: Callable[..., Mdev]):
    mdev = create("mbochs-large", resolution="4095x4095")
    assert mdev.get_attribute("resolution") == (4095, 4095)


def test_listing_types_loads_no_model():
    """`mdevkit types` shall not pay for what only a device needs."""
    code = (
        "import sys; from mdevkit_mbochs.mbochs.parent import MbochsParent; from mdevkit_mbochs.mdpy.parent import MdpyParent;"
        "MbochsParent(); MdpyParent();"
        "print(sys.modules.keys() & {'mdevkit_mbochs.display', 'mdevkit_mbochs.onlookers', 'mdevkit_vfio.pci', 'ctypes', 'zlib'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
