"""What the kernel takes and refuses of what is written into sysfs, and how links, PCI parents and messages of udev look."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from pathlib import PurePath

import pytest
from mdevkit.errors import MdevError
from mdevkit_service.schema import Parent
from mdevkit_service.sysfs import texts
from mdevkit_service.sysfs.nodes import Binary, File, Link, text
from mdevkit_service.sysfs.parents import pci_config, pci_variables
from mdevkit_service.sysfs.places import Pci
from mdevkit_service.sysfs.uevents import message, murmur2, told

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"


def refusal(call, *arguments):
    with pytest.raises(MdevError) as caught:
        call(*arguments)
    assert caught.value.name == "EINVAL"
    return str(caught.value)


@pytest.mark.parametrize("end", [b"", b"\n", b"\0"])
def test_create_takes_36_or_37_bytes_in_either_case(end):
    assert texts.uuid(UUID.upper().encode() + end) == UUID


@pytest.mark.parametrize(
    "data",
    [
        b"",
        UUID[:-1].encode(),
        UUID.encode() + b"x",
        UUID.encode() + b"\n\n",
        b" " + UUID.encode(),
        b"{%s}" % UUID.encode(),
        b"\xff" * 36,
    ],
)
def test_create_refuses_everything_else(data):
    refusal(texts.uuid, data)


def test_create_names_what_it_refuses():
    assert refusal(texts.uuid, b"nonsense\n") == "b'nonsense\\n' is not a UUID and nothing else"
    assert "is not a UUID (8-4-4-4-12 hex digits)" in refusal(texts.uuid, b"x" * 36)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"1", 1),
        (b"1\n", 1),
        (b"+1", 1),
        (b"0", 0),
        (b"0x10\n", 16),
        (b"0X1f", 31),
        (b"010", 8),
        (b"18446744073709551615", 2**64 - 1),
    ],
)
def test_numbers_as_kstrtoul_takes_them(data, value):
    assert texts.unsigned(data) == value


@pytest.mark.parametrize("data", [b"", b"\n", b"-1", b" 1", b"1 ", b"1\n\n", b"08", b"0x", b"one", b"1\0", b"18446744073709551616"])
def test_what_kstrtoul_refuses(data):
    refusal(texts.unsigned, data)


def test_a_line_loses_one_newline_only():
    assert texts.line(b"a b\n") == "a b"
    assert texts.line(b"a\n\n") == "a\n"
    assert texts.line(b"") == ""
    assert "is not text" in refusal(texts.line, b"\xff\xfe")


@pytest.mark.parametrize(
    ("data", "value"), [(b"1\n", True), (b"Yes", True), (b"on", True), (b"0", False), (b"no\n", False), (b"off", False)]
)
def test_flags_as_kstrtobool_takes_them(data, value):
    assert texts.flag(data) is value


def test_what_is_no_flag():
    assert "is neither yes nor no" in refusal(texts.flag, b"perhaps")


@pytest.mark.parametrize(
    ("path", "target", "link"),
    [
        ("/class/mdev_bus/mtty", "/devices/virtual/mtty/mtty", "../../devices/virtual/mtty/mtty"),
        ("/devices/virtual/m/p/u/mdev_type", "/devices/virtual/m/p/mdev_supported_types/t", "../mdev_supported_types/t"),
        ("/devices/virtual/m/p/mdev_supported_types/t/devices/u", "/devices/virtual/m/p/u", "../../../u"),
    ],
)
def test_links_are_as_short_as_those_of_sysfs(path, target, link):
    assert Link(target).text(path) == link
    assert os.path.normpath(PurePath(path).parent / link) == target


def test_modes_are_those_of_sysfs():
    modes = [
        stat.S_IMODE(file.mode)
        for file in (text("x"), File(store=lambda data: None), File(lambda: "", lambda data: None), Binary(data=b"12"))
    ]
    assert modes == [0o444, 0o200, 0o644, 0o444]
    assert (text("x").size, Binary(data=b"12").size) == (4096, 2)


def test_an_empty_text_is_an_empty_line_unless_it_is_a_list_of_lines():
    assert text("").read() == b"\n"
    assert File(lambda: "", bare=True).read() == b""
    assert File(lambda: "A=1", bare=True).read() == b"A=1\n"


def test_a_pci_parent_is_asked_for_by_its_address():
    assert Pci.parse("mtty=0000:99:00.0") == Pci("mtty", "0000:99:00.0", "0000:99", 0x1AF4, 0x10F0)
    assert Pci.parse("0000:06:00.1") == Pci("0000:06:00.1", "0000:06:00.1", "0000:06")
    assert Pci.parse("a=b=0000:06:00.1,8086:1572") == Pci("a=b", "0000:06:00.1", "0000:06", 0x8086, 0x1572)


@pytest.mark.parametrize(
    "wanted", ["mtty", "mtty=99:00.0", "mtty=0000:99:00.8", "mtty=0000:99:00.0,1af4", "=0000:99:00.0", "m=0000:9A:00.0"]
)
def test_what_is_no_pci_parent(wanted):
    assert "is not PARENT=DDDD:BB:SS.F[,VENDOR:DEVICE] in lower-case hex, e.g. mtty=0000:99:00.0,1af4:10f0" in refusal(
        Pci.parse, wanted
    )


def test_configuration_space_and_variables_of_a_pci_parent():
    looks = Pci.parse("mtty=0000:99:00.0,8086:1572")
    config = pci_config(looks)
    assert len(config) == 256
    assert struct.unpack_from("<HH", config) == struct.unpack_from("<HH", config, 0x2C) == (0x8086, 0x1572)
    assert config[0x08:0x0C] == bytes([0, 0, 0, 0x12])
    assert pci_variables(Parent("mtty", "mtty", "mtty", [], {}, []), looks) == {
        "DRIVER": "mtty",
        "PCI_CLASS": "120000",
        "PCI_ID": "8086:1572",
        "PCI_SUBSYS_ID": "8086:1572",
        "PCI_SLOT_NAME": "0000:99:00.0",
        "MODALIAS": "pci:v00008086d00001572sv00008086sd00001572bc12sc00i00",
    }


def test_murmur_hashes_of_every_remainder():
    """Values of the reference implementation, MurmurHash2() of 32 bits with seed 0."""
    assert [murmur2(data) for data in (b"", b"a", b"ab", b"abc", b"abcd")] == [0, 0x92685F5E, 0x1AA14063, 0x13577C9B, 0x26873021]


def test_a_message_of_udev_has_its_properties_where_its_header_says():
    data = message("mdev", {"ACTION": "add", "SEQNUM": "7"})
    prefix, magic, size, offset, length, hashed = struct.unpack_from("=8s4sIII4s", data)
    assert (prefix, magic, size) == (b"libudev\0", bytes.fromhex("feedcafe"), 40)
    assert data[offset : offset + length] == b"ACTION=add\0SEQNUM=7\0"
    assert offset + length == len(data)
    assert hashed == murmur2(b"mdev").to_bytes(4, "big")


def test_what_a_plugin_puts_into_a_variable_cannot_add_another():
    assert told({"ERROR": "a\0SUBSYSTEM=block\nX"}) == {"ERROR": "a SUBSYSTEM=block X"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else: run as root")
def test_only_root_tells_listeners_of_udev():
    program = "import os\nfrom mdevkit_service.sysfs.uevents import Announcer\nos.setuid(65534)\nAnnouncer()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr.rstrip().endswith("only root can tell libudev's listeners of devices (--udev)")
