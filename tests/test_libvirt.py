"""libvirt, unmodified, on the mounted tree: parents with their types, and devices created, defined, started and destroyed by virsh.

libvirtd runs in the root of tools, in mount and network namespaces of its own: the tree is its /sys, and the messages of udev
that the mount sends reach nobody else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from ctypes.util import find_library
from pathlib import Path

import pytest

from tests.guests.root import MANAGEMENT, find_root
from tests.services import Running, wait_until

PARENT = "pci_0000_99_00_0"
UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "c4c5a1a3-2bd4-4f83-8c9e-0a55d0d1b0aa"
DEVICE = f"mdev_{UUID.replace('-', '_')}_0000_99_00_0"

#: Makes a root in which libvirtd can write, out of one that it cannot; ends with its standard input.
_SETUP = """set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
rm -rf var/run
mkdir -p proc sys dev run/udev tmp root etc/mdevctl.d
ln -s ../run var/run
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs tmpfs /run
mkdir /run/udev
# Where this is missing libudev believes that nobody sends what udevd would.
touch run/udev/control /run/udev/control
echo root:x:0:0:root:/root:/bin/sh >etc/passwd
echo root:x:0: >etc/group
printf '%s = "%s"\\n' unix_sock_group root auth_unix_rw none auth_unix_ro none log_outputs 3:stderr >etc/libvirtd.conf
chroot . /sbin/ldconfig
echo ready
exec cat
"""

#: Prints each event of mediated devices as libudev tells it, with a filter in the socket.
_LISTENER = """
import ctypes, select, sys
udev = ctypes.CDLL(sys.argv[1])
pointers = ["udev_new", "udev_monitor_new_from_netlink", "udev_monitor_receive_device"]
texts = ["udev_device_get_action", "udev_device_get_devpath", "udev_device_get_property_value"]
for names, kind in ((pointers, ctypes.c_void_p), (texts, ctypes.c_char_p)):
    for name in names:
        getattr(udev, name).restype = kind
monitor = ctypes.c_void_p(udev.udev_monitor_new_from_netlink(ctypes.c_void_p(udev.udev_new()), b"udev"))
udev.udev_monitor_filter_add_match_subsystem_devtype(monitor, b"mdev", None)
udev.udev_monitor_enable_receiving(monitor)
print("listening", flush=True)
while select.select([udev.udev_monitor_get_fd(monitor)], [], [], 30)[0]:
    device = ctypes.c_void_p(udev.udev_monitor_receive_device(monitor))
    if device:
        driver = udev.udev_device_get_property_value(device, b"DRIVER") or b"-"
        facts = udev.udev_device_get_action(device), udev.udev_device_get_devpath(device), driver
        print(b" ".join(facts).decode(), flush=True)
"""


class Room:
    """Namespaces with a root of their own in it, the tree mounted on its /sys, and libvirtd."""

    def __init__(self, service, folder, tools):
        self.service = service
        self.folder = folder
        self.root = folder / "root"
        self.errors = folder.with_suffix(".log")
        self._processes = []
        try:
            self._open(tools)
        except BaseException:
            self.close()
            raise

    def _open(self, tools):
        self.folder.mkdir()
        command = ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", _SETUP, "sh", self.folder, tools]
        self.holder = self.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.holder.stdout.readline() == b"ready\n", self.said()
        python = [sys.executable, "-P", "-m", "mdevkit_service.sysfs", "--socket", self.service.socket]
        looks = ["--udev", "--pci", "demo0=0000:99:00.0"]
        self.start(*self.inside(*python, *looks, self.root / "sys"))
        self.seen = Path(f"/proc/{self.holder.pid}/root{self.root}")
        wait_until((self.seen / "sys/class").is_dir, what="the mount")
        trust = "SYSTEMD_DEVICE_VERIFY_SYSFS=0"  # or libudev wants the kernel's sysfs and no other
        self.start(*self.inside("chroot", self.root, "env", trust, "libvirtd", "-f", "/etc/libvirtd.conf"))
        wait_until(lambda: self.virsh("nodedev-list", check=False).returncode == 0, what=f"libvirtd's start ({self.said()})")

    def inside(self, *words):
        """Return the command line of something that runs in the namespaces."""
        return ["nsenter", "-t", self.holder.pid, "--mount", "--net", *words]

    def start(self, *words, **more):
        """Start a process of the room."""
        kept = {name: value for name, value in self.service.environment.items() if not name.startswith("RUST_")}
        with self.errors.open("ab") as log:
            process = subprocess.Popen([str(word) for word in words], env=kept, stderr=log, **more)
        self._processes.append(process)
        return process

    def said(self):
        """Return what the processes of the room complained of."""
        return self.errors.read_text() if self.errors.exists() else ""

    def run(self, *words, check=True):
        """Run a command in the root to its end."""
        command = [str(word) for word in self.inside("chroot", self.root, "env", "-u", "RUST_BACKTRACE", *words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, done
        return done

    def virsh(self, *words, check=True):
        """Run virsh."""
        return self.run("virsh", "-q", "-c", "nodedev:///system?mode=legacy", *words, check=check)

    def names(self, *words):
        """Return the names virsh lists."""
        return self.virsh("nodedev-list", *words).stdout.split()

    def describe(self, name, *words):
        """Return virsh's description of a device."""
        return ET.fromstring(self.virsh("nodedev-dumpxml", name, *words).stdout)

    def info(self, name):
        """Return the three states of a device: active, persistent, autostart."""
        facts = dict(line.split(":", 1) for line in self.virsh("nodedev-info", name).stdout.splitlines() if ":" in line)
        return tuple(facts[fact].strip() for fact in ("Active", "Persistent", "Autostart"))

    def file(self, uuid=UUID, type_="demo-small", **attributes):
        """Write the description of a device to create or define, and return its path in the root."""
        lines = "".join(f"<attr name='{name}' value='{value}'/>" for name, value in attributes.items())
        capability = f"<capability type='mdev'><type id='{type_}'/><uuid>{uuid}</uuid>{lines}</capability>"
        (self.seen / "tmp/device.xml").write_text(f"<device><parent>{PARENT}</parent>{capability}</device>")
        return "/tmp/device.xml"

    def settle(self):
        """Wait until libvirt has seen every device come.

        It keeps one for ever that goes before that, on the kernel's tree as well as on ours: what mdevctl lists while an earlier
        event is dealt with becomes a device without a path, and its removal, told by the path, is dropped (libvirt 11.3,
        nodeDeviceUpdateMediatedDevice and processNodeDeviceRemoveEvent).
        """
        names = {f"mdev_{uuid.replace('-', '_')}_0000_99_00_0" for uuid, _, _ in devices(self)}
        wait_until(lambda: set(self.names("--cap", "mdev")) == names, what="libvirt's taking note")

    def clean(self):
        """Remove what a test has left."""
        for definition in (self.seen / "etc/mdevctl.d").glob("*/*"):
            definition.unlink()
        self.settle()
        with self.service.client() as client:
            for device in client.get("/v1/devices"):
                client.delete(f"/v1/devices/{device['uuid']}?force=1")
        wait_until(lambda: not self.names("--cap", "mdev", "--all"), what="libvirt's forgetting")

    def close(self):
        """End everything; the namespaces go with their last process."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()


@pytest.fixture(scope="module")
def shared_room(tmp_path_factory):
    tools = find_root(MANAGEMENT)
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("namespaces, FUSE and root are needed: apt-get install fuse3 libfuse3-3, and run as root")
    if tools is None or shutil.which("nsenter") is None:
        pytest.skip("libvirt and nsenter are needed: ./dev guests, apt-get install util-linux")
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    service = Running(folder, folder).start()
    try:
        room = Room(service, folder / "room", tools)
        yield room
        room.close()
    finally:
        service.clean_up()


@pytest.fixture
def room(shared_room):
    shared_room.clean()
    return shared_room


def devices(room):
    with room.service.client() as client:
        return {(device["uuid"], device["parent"], device["type"]) for device in client.get("/v1/devices")}


def test_parents_and_types(room):
    assert room.names("--cap", "mdev_types") == [PARENT]
    found = room.describe(PARENT)
    assert found.findtext("driver/name") == "demo"
    assert found.find("capability[@type='pci']/vendor").get("id") == "0x1af4"
    types = {type_.get("id"): type_ for type_ in found.iter("type")}
    assert sorted(types) == ["demo-big", "demo-many", "demo-small"]
    small = {child.tag: child.text for child in types["demo-small"]}
    assert small == {"name": "Small demo device", "deviceAPI": "demo", "availableInstances": "8"}


def test_create_and_destroy(room):
    room.virsh("nodedev-create", room.file(speed=77))
    assert devices(room) == {(UUID, "demo0", "demo-small")}
    with room.service.client() as client:
        assert client.get(f"/v1/devices/{UUID}/attributes/speed") == {"value": "77"}
    found = room.describe(DEVICE)
    assert (found.findtext("parent"), found.findtext("driver/name")) == (PARENT, "demo_drv")
    capability = found.find("capability")
    assert (capability.findtext("uuid"), capability.findtext("parent_addr")) == (UUID, "0000:99:00.0")
    assert capability.find("iommuGroup").get("number").isdecimal()
    assert room.info(DEVICE) == ("yes", "no", "no")
    assert [text for text in room.describe(PARENT).itertext() if text.isdecimal()].count("7") == 1, "instances are told live"
    room.virsh("nodedev-destroy", DEVICE)
    assert devices(room) == set()
    room.settle()


def test_define_start_autostart_undefine(room):
    room.virsh("nodedev-define", room.file(note="stored"))
    assert devices(room) == set()
    wait_until(lambda: room.names("--cap", "mdev", "--inactive") == [DEVICE], what="libvirt's taking note")
    assert room.info(DEVICE) == ("no", "yes", "no")
    room.virsh("nodedev-autostart", DEVICE)
    wait_until(lambda: room.info(DEVICE) == ("no", "yes", "yes"), what="libvirt's taking note")
    room.virsh("nodedev-start", DEVICE)
    assert devices(room) == {(UUID, "demo0", "demo-small")}
    wait_until(lambda: room.info(DEVICE) == ("yes", "yes", "yes"), what="libvirt's taking note")
    room.virsh("nodedev-destroy", DEVICE)
    wait_until(lambda: room.info(DEVICE) == ("no", "yes", "yes"), what="libvirt's taking note")
    # What udev runs when the parent comes.
    room.run("mdevctl", "start-parent-mdevs", "0000:99:00.0")
    wait_until(lambda: room.info(DEVICE) == ("yes", "yes", "yes"), what="libvirt's taking note")
    room.virsh("nodedev-undefine", DEVICE)
    wait_until(lambda: room.info(DEVICE)[:2] == ("yes", "no"), what="libvirt's taking note")


def test_what_others_create_and_remove(room):
    with room.service.client() as client:
        client.post("/v1/devices", {"type": "demo-big", "uuid": OTHER, "parent": "demo0"})
        name = f"mdev_{OTHER.replace('-', '_')}_0000_99_00_0"
        wait_until(lambda: room.names("--cap", "mdev") == [name], what="libvirt's taking note")
        client.delete(f"/v1/devices/{OTHER}")
    room.settle()


def test_refusals_are_told(room):
    with room.service.client() as client:
        for number in range(2):
            client.post(
                "/v1/devices", {"type": "demo-big", "uuid": f"00000000-0000-4000-8000-00000000000{number}", "parent": "demo0"}
            )
    done = room.virsh("nodedev-create", room.file(type_="demo-big"), check=False)
    assert done.returncode == 1
    assert "No available instances of demo-big on 0000:99:00.0" in done.stderr


def test_libudev_takes_each_event_through_its_filter(room):
    """Not libvirt alone: any program that listens for mediated devices."""
    library = find_library("udev")
    if library is None:
        pytest.skip("libudev is missing: apt-get install libudev1")
    listener = room.start(*room.inside(sys.executable, "-c", _LISTENER, library), stdout=subprocess.PIPE)
    assert listener.stdout.readline() == b"listening\n"
    path = f"/devices/pci0000:99/0000:99:00.0/{UUID}"
    with room.service.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "parent": "demo0"})
        (room.seen / f"sys{path}/uevent").write_text("change\n")
        room.settle()
        client.delete(f"/v1/devices/{UUID}")
    told = [listener.stdout.readline().decode().split() for _ in range(5)]
    assert sorted(told) == sorted(
        [
            ["add", path, "-"],
            ["bind", path, "demo_drv"],
            ["change", path, "demo_drv"],
            ["unbind", path, "demo_drv"],
            ["remove", path, "-"],
        ]
    )
    assert [action for action, *_ in told if action != "change"] == ["add", "bind", "unbind", "remove"]
