"""The tree, really mounted over a real service: its structure, what each file does, and how a mount begins and ends."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from ctypes.util import find_library
from pathlib import Path

import pytest

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "c4c5a1a3-2bd4-4f83-8c9e-0a55d0d1b0aa"
DEMO = "devices/virtual/demo/demo0"


def wait_until(true, what, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds} s")
        time.sleep(0.01)  # nobody tells us
    return found


@contextmanager
def fails(number):
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno] == number, caught.value


def write(path, data):
    """One write(2), as a shell does it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        return os.write(descriptor, data.encode() if isinstance(data, str) else data)
    finally:
        os.close(descriptor)


class Mount:
    """A mount whose process is ours."""

    def __init__(self, service, folder, *options):
        self.root = folder
        folder.mkdir(exist_ok=True)
        command = [Path(sys.executable).with_name("mdevkit"), "sysfs", "mount", "--foreground", *options, folder]
        self.errors = folder.with_suffix(".log")
        with self.errors.open("ab") as log:
            self.process = subprocess.Popen(command, env=service.environment, stderr=log)
        wait_until(lambda: os.path.ismount(folder) or self.process.poll() is not None, f"the mount ({self.said()})")
        assert self.process.poll() is None, self.said()

    def said(self):
        return self.errors.read_text() if self.errors.exists() else ""

    def __truediv__(self, path):
        return self.root / path

    def read(self, path):
        return (self.root / path).read_text()

    def write(self, path, data):
        return write(self.root / path, data)

    def ls(self, path):
        return sorted(node.name for node in (self.root / path).iterdir())

    def create(self, uuid=UUID, type_="demo-small", parent="demo0"):
        self.write(f"class/mdev_bus/{parent}/mdev_supported_types/{type_}/create", uuid)

    def end(self):
        if self.process.poll() is None:
            # A connection without its process fails whoever waits in it: nothing can hang from here on.
            self.process.kill()
            self.process.wait()
        unmount(self.root)


def unmount(folder):
    """Take away whatever is mounted there, however often."""
    while subprocess.run(["umount", "-l", folder], capture_output=True, check=False).returncode == 0:
        pass


@pytest.fixture(scope="session")
def fuse():
    """Skip without FUSE."""
    missing = not os.access("/dev/fuse", os.W_OK) or not (find_library("fuse3") or find_library("fuse"))
    if missing or os.geteuid() != 0:
        pytest.skip("FUSE and root are needed: apt-get install fuse3 libfuse3-3")


@pytest.fixture
def mounts(service, fuse, tmp_path):
    """Mounts the tree, several times if need be, and ends all."""
    made = []

    def mount(*options, name="sys"):
        made.append(Mount(service, tmp_path / name, *options))
        return made[-1]

    yield mount
    for one in made:
        one.end()


@pytest.fixture
def tree(mounts, client):
    """A mount of its own, over a service of its own."""
    return mounts()


@pytest.fixture(scope="module")
def shared_tree(shared, fuse, tmp_path_factory):
    mount = Mount(shared, tmp_path_factory.mktemp("mount") / "sys")
    yield mount
    mount.end()


@pytest.fixture
def world(shared, shared_tree):
    """The module's service and mount, without devices: for tests that break neither."""
    with shared.client() as client:
        for device in client.get("/v1/devices"):
            client.delete(f"/v1/devices/{device['uuid']}?force=1")
    return shared_tree


@pytest.fixture
def api(shared, world):
    """A client of the module's service."""
    with shared.client() as client:
        yield client


# -- structure -------------------------------------------------------------------------------------------------------------


def test_buses_and_classes(world):
    assert world.ls("") == ["bus", "class", "devices", "kernel"]
    assert world.ls("bus") == ["demo", "mdev"]
    assert world.ls("bus/mdev") == ["devices", "drivers", "drivers_autoprobe", "drivers_probe", "uevent"]
    assert world.ls("class") == ["demo", "demo_bus", "mdev_bus"]
    for folder in ("demo", "demo_bus", "mdev_bus"):
        assert world.ls(f"class/{folder}") == ["demo0", "demo1", "twin0", "twin1"]
        assert str((world / f"class/{folder}/demo0").readlink()) == "../../devices/virtual/demo/demo0"


def test_a_parent(world):
    assert world.ls(DEMO) == ["crash_on_create", "label", "mdev_supported_types", "power", "subsystem", "uevent"]
    assert (world / f"{DEMO}/subsystem").resolve() == world / "class/demo"
    assert world.read(f"{DEMO}/uevent") == ""
    assert world.ls(f"{DEMO}/power") == ["control", "runtime_active_time", "runtime_status", "runtime_suspended_time"]
    assert world.read(f"{DEMO}/power/runtime_status") == "unsupported\n"


def test_a_type(world):
    folder = f"{DEMO}/mdev_supported_types"
    assert world.ls(folder) == ["demo-big", "demo-many", "demo-small"]
    assert world.ls(f"{folder}/demo-big") == ["available_instances", "create", "description", "device_api", "devices", "name"]
    assert world.read(f"{folder}/demo-big/name") == "Big demo device\n"
    assert world.read(f"{folder}/demo-big/description") == "Big demo device\nfor tests\n"
    assert world.read(f"{folder}/demo-big/device_api") == "demo\n"
    assert world.read(f"{folder}/demo-big/available_instances") == "2\n"


def test_a_device(world):
    world.create()
    device = world / f"{DEMO}/{UUID}"
    own = ["driver", "driver_override", "iommu_group", "mdev_type", "power", "remove", "subsystem", "uevent"]
    assert world.ls(device) == sorted([*own, "client", "crash", "hang", "line", "moody", "note", "serial", "speed"])
    links = {name: str((device / name).readlink()) for name in ("driver", "iommu_group", "mdev_type", "subsystem")}
    group, _, number = links.pop("iommu_group").rpartition("/")
    assert (group, number.isdecimal()) == ("../../../../../kernel/iommu_groups", True)
    assert (device / "iommu_group").resolve(strict=True).is_dir()
    assert links == {
        "driver": "../../../../../bus/demo/drivers/demo_drv",
        "mdev_type": "../mdev_supported_types/demo-small",
        "subsystem": "../../../../../bus/demo",
    }
    for name in links:
        assert (device / name).resolve(strict=True).is_dir()
    assert world.read(f"{DEMO}/{UUID}/uevent") == "DRIVER=demo_drv\nMODALIAS=demo:c01\n"


def test_a_device_is_found_from_everywhere(world):
    world.create()
    device = world / f"{DEMO}/{UUID}"
    places = [
        "bus/mdev/devices",
        "bus/demo/devices",
        "bus/demo/drivers/demo_drv",
        f"{DEMO}/mdev_supported_types/demo-small/devices",
        f"kernel/iommu_groups/{world.ls('kernel/iommu_groups')[0]}/devices",
    ]
    for place in places:
        assert UUID in world.ls(place)
        assert (world / place / UUID).resolve(strict=True) == device
    assert world.ls(f"{DEMO}/mdev_supported_types/demo-big/devices") == []
    assert world.ls("bus/mdev/drivers") == []
    assert UUID in world.ls(DEMO)
    assert UUID not in world.ls("devices/virtual/demo/demo1")
    assert not (world / f"devices/virtual/demo/demo1/{UUID}").exists()


def test_kinds_are_told_by_the_folder_itself(world):
    """What os.scandir and `find -type` use, without a stat of each."""
    world.create()
    with os.scandir(world / f"{DEMO}/{UUID}") as entries:
        kinds = {entry.name: (entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries}
    assert kinds["power"] == (True, False)
    assert kinds["mdev_type"] == (False, True)
    assert kinds["speed"] == (False, False)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("mdev_supported_types/demo-big/create", 0o200),
        ("mdev_supported_types/demo-big/name", 0o444),
        ("label", 0o644),
        (f"{UUID}/remove", 0o200),
        (f"{UUID}/speed", 0o644),
        (f"{UUID}/serial", 0o444),
        (f"{UUID}/crash", 0o200),
        (f"{UUID}/driver_override", 0o644),
        (f"{UUID}/uevent", 0o644),
    ],
)
def test_modes_bind_root_too(world, path, mode):
    world.create()
    file = world / f"{DEMO}/{path}"
    status = file.lstat()
    assert (stat.S_IMODE(status.st_mode), status.st_size, status.st_uid) == (mode, 4096, os.getuid())
    for bit, flags in ((0o400, os.O_RDONLY), (0o200, os.O_WRONLY)):
        if mode & bit:
            os.close(os.open(file, flags))
        else:
            with fails("EACCES"):
                os.open(file, flags)


def test_nothing_is_made_or_unmade_by_hand(world):
    with fails("EACCES"):
        (world / f"{DEMO}/new").touch()
    for attempt in (
        lambda: (world / "bus/new").mkdir(),
        lambda: (world / f"{DEMO}/label").unlink(),
        lambda: (world / "bus/mdev").rmdir(),
        lambda: (world / f"{DEMO}/label").rename(world / f"{DEMO}/other"),
        lambda: (world / "link").symlink_to("bus"),
        lambda: (world / f"{DEMO}/label").chmod(0o777),
        lambda: os.link(world / f"{DEMO}/label", world / "hard"),
    ):
        with fails("EPERM"):
            attempt()
    for missing in ("nothing", "bus/pci", "class/pci_bus", f"{DEMO}/nothing", f"bus/mdev/devices/{UUID}", "kernel/iommu_groups/7"):
        with fails("ENOENT"):
            (world / missing).lstat()
    with fails("ENOTDIR"):
        (world / f"{DEMO}/label/x").lstat()


# -- create and remove -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [UUID, f"{UUID}\n", UUID.upper()])
def test_create_takes_a_uuid_with_or_without_a_newline(world, api, text):
    assert world.write(f"{DEMO}/mdev_supported_types/demo-small/create", text) == len(text)
    (device,) = api.get("/v1/devices")
    assert (device["uuid"], device["parent"], device["type"], device["state"]) == (UUID, "demo0", "demo-small", "bound")
    assert world.ls("bus/mdev/devices") == [UUID]
    assert world.read(f"{DEMO}/mdev_supported_types/demo-small/available_instances") == "7\n"


@pytest.mark.parametrize("text", ["x", f"{UUID}\n\n", f"{UUID}x", f"{{{UUID}}}", "\n", "x" * 36, "x" * 5000])
def test_create_refuses_what_is_no_uuid(world, api, text):
    with fails("EINVAL"):
        world.create(text)
    assert api.get("/v1/devices") == []


def test_the_services_errno_reaches_the_writer(tree, client):
    tree.create()
    with fails("EEXIST"):
        tree.create(parent="demo1")
    tree.create(OTHER, "demo-big")
    with fails("ENOSPC"):
        tree.create("11111111-2222-4333-8444-555555555555", "demo-big")
    assert "instance" in tree.said()
    client.put(f"/v1/devices/{OTHER}/attributes/client", {"value": "pid 1"})
    with fails("EBUSY"):
        tree.write(f"{DEMO}/{OTHER}/remove", "1")
    assert f"{DEMO}/{OTHER}/remove: " in tree.said()
    assert "is in use by pid 1" in tree.said()


@pytest.mark.parametrize("text", ["1", "1\n", "0x1", "+7", "01"])
def test_remove_takes_a_number(world, api, text):
    world.create()
    assert world.write(f"bus/mdev/devices/{UUID}/remove", text) == len(text)
    assert api.get("/v1/devices") == []
    assert world.ls("bus/mdev/devices") == []
    with fails("ENOENT"):
        (world / f"{DEMO}/{UUID}").lstat()


def test_remove_of_zero_does_nothing_and_nonsense_is_refused(world, api):
    world.create()
    assert world.write(f"{DEMO}/{UUID}/remove", "0\n") == 2
    for text in ("yes", "-1", "1 ", "08"):
        with fails("EINVAL"):
            world.write(f"{DEMO}/{UUID}/remove", text)
    assert len(api.get("/v1/devices")) == 1


def test_a_file_of_a_removed_device_that_is_open_says_enodev(world):
    world.create()
    speed, remove = (
        os.open(world / f"{DEMO}/{UUID}/{name}", flags) for name, flags in (("speed", os.O_RDWR), ("remove", os.O_WRONLY))
    )
    assert os.read(speed, 100) == b"10\n"
    os.write(remove, b"1")
    with fails("ENODEV"):
        os.pread(speed, 100, 0)
    with fails("ENODEV"):
        os.write(speed, b"3")
    with fails("ENODEV"):
        os.write(remove, b"1")
    os.close(speed)
    os.close(remove)


def test_a_hundred_times_the_same_device(world):
    """Events come late: none may show a device that is gone, or hide one that is there again."""
    for _ in range(100):
        world.create()
        assert (world / f"bus/mdev/devices/{UUID}/driver/bind").exists()
        world.write(f"bus/mdev/devices/{UUID}/remove", "1")
        assert not os.path.lexists(world / f"bus/mdev/devices/{UUID}")


def test_what_others_create_is_there_at_once_and_what_they_remove_is_soon_gone(world, api):
    for _ in range(30):
        api.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
        assert (world / f"bus/mdev/devices/{UUID}/driver").exists()
        api.delete(f"/v1/devices/{UUID}")
        assert world.ls("bus/mdev/devices") == []
        wait_until(lambda: not os.path.lexists(world / f"bus/mdev/devices/{UUID}"), "the device's end", 1)


def test_the_last_instance_has_one_winner(world):
    results = []

    def attempt(number):
        try:
            world.create(f"00000000-0000-4000-8000-{number:012}", "demo-big")
        except OSError as error:
            results.append(error.errno)
        else:
            results.append(0)

    world.create(type_="demo-big")
    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [0] + [errno.ENOSPC] * 19


# -- attributes ------------------------------------------------------------------------------------------------------------


def test_attributes_are_read_and_stored_live(world, api):
    world.create()
    speed = f"{DEMO}/{UUID}/speed"
    assert world.read(speed) == "10\n"
    assert world.write(speed, "0x14\n") == 5
    assert api.get(f"/v1/devices/{UUID}/attributes/speed") == {"value": "20"}
    api.put(f"/v1/devices/{UUID}/attributes/speed", {"value": "30"})
    assert world.read(speed) == "30\n"
    for text, number in (("1001", "EINVAL"), ("x", "EINVAL"), (b"\xff", "EINVAL")):
        with fails(number):
            world.write(speed, text)
    with fails("ERANGE"):
        world.write(f"{DEMO}/{UUID}/moody", "3")
    assert "speed: whole number" in world.said() or "is not between 0 and 1000" in world.said()
    assert world.read(f"{DEMO}/{UUID}/note") == "\n"
    assert world.write(f"{DEMO}/label", "left\n") == 5
    assert world.read(f"{DEMO}/label") == "left\n"


def test_a_file_is_made_anew_when_it_is_read_from_its_beginning(world, api):
    world.create()
    api.put(f"/v1/devices/{UUID}/attributes/note", {"value": "abcdef"})
    descriptor = os.open(world / f"{DEMO}/{UUID}/note", os.O_RDONLY)
    assert os.read(descriptor, 3) == b"abc"
    api.put(f"/v1/devices/{UUID}/attributes/note", {"value": "uvwxyz"})
    assert os.read(descriptor, 100) == b"def\n"
    assert os.read(descriptor, 100) == b""
    assert os.pread(descriptor, 100, 0) == b"uvwxyz\n"
    os.close(descriptor)


def test_each_write_is_one_store_whatever_the_offset(world):
    world.create()
    descriptor = os.open(world / f"{DEMO}/{UUID}/speed", os.O_RDWR)
    for text in (b"11", b"12\n", b"13"):
        assert os.write(descriptor, text) == len(text)
    assert os.pread(descriptor, 10, 0) == b"13\n"
    os.close(descriptor)
    with (world / f"{DEMO}/{UUID}/speed").open("a") as file:
        file.write("14")
    assert world.read(f"{DEMO}/{UUID}/speed") == "14\n"
    assert os.truncate(world / f"{DEMO}/{UUID}/speed", 0) is None
    assert world.read(f"{DEMO}/{UUID}/speed") == "14\n"


def test_no_more_than_a_page_is_taken_at_once(world):
    world.create()
    assert world.write(f"{DEMO}/{UUID}/note", "x" * 4095 + "\nmore") == 4096
    assert world.read(f"{DEMO}/{UUID}/note") == "x" * 4095 + "\n"


def test_a_slow_vendor_holds_up_nobody_else(world):
    world.create()
    slow = threading.Thread(target=world.write, args=(f"{DEMO}/{UUID}/hang", "2"))
    begun = time.monotonic()
    slow.start()
    world.create(OTHER, parent="demo1")
    assert world.read(f"devices/virtual/demo/demo1/{OTHER}/speed") == "10\n"
    assert time.monotonic() - begun < 1.5
    slow.join(10)


# -- drivers ---------------------------------------------------------------------------------------------------------------


def test_bind_and_unbind(world):
    world.create()
    driver, link = "bus/demo/drivers/demo_drv", world / f"{DEMO}/{UUID}/driver"
    assert world.ls(driver) == [UUID, "bind", "uevent", "unbind"]
    assert world.write(f"{driver}/unbind", f"{UUID}\n") == 37
    assert not os.path.lexists(link)
    assert world.ls(driver) == ["bind", "uevent", "unbind"]
    assert world.read(f"{DEMO}/{UUID}/uevent") == "MODALIAS=demo:c01\n"
    with fails("ENODEV"):
        world.write(f"{driver}/unbind", UUID)
    assert world.write(f"{driver}/bind", UUID) == 36
    assert link.resolve() == world / driver
    for number, uuid in (("EBUSY", UUID), ("ENODEV", OTHER), ("ENODEV", "nonsense")):
        with fails(number):
            world.write(f"{driver}/bind", uuid)


def test_drivers_probe_and_autoprobe(tree, client):
    assert tree.read("bus/demo/drivers_autoprobe") == "1\n"
    tree.write("bus/demo/drivers_autoprobe", "0")
    assert tree.read("bus/demo/drivers_autoprobe") == "0\n"
    tree.create()
    assert client.get(f"/v1/devices/{UUID}")["state"] == "unbound"
    assert tree.write("bus/demo/drivers_probe", UUID) == 36
    assert client.get(f"/v1/devices/{UUID}")["driver"] == "demo_drv"
    assert tree.write("bus/mdev/drivers_probe", UUID) == 36, "one that is bound is left as it is"
    tree.write("bus/demo/drivers_autoprobe", "1")
    tree.create(OTHER)
    assert client.get(f"/v1/devices/{OTHER}")["state"] == "bound"
    with fails("ENODEV"):
        tree.write("bus/demo/drivers_probe", "nonsense")
    with fails("EINVAL"):
        tree.write("bus/demo/drivers_autoprobe", "perhaps")


def test_driver_override(world, api):
    world.create()
    file = f"{DEMO}/{UUID}/driver_override"
    assert world.read(file) == "(null)\n"
    world.write(file, "other_drv\n")
    assert world.read(file) == "other_drv\n"
    world.write("bus/demo/drivers/demo_drv/unbind", UUID)
    with fails("ENODEV"):
        world.write("bus/demo/drivers_probe", UUID)
    world.write(file, "\n")
    assert world.read(file) == "(null)\n"
    assert api.get(f"/v1/devices/{UUID}")["driver_override"] is None
    world.write("bus/demo/drivers_probe", UUID)
    with fails("EINVAL"):
        world.write(file, "x" * 4095)


def test_an_event_can_be_asked_for(world):
    world.create()
    for path in (f"{DEMO}/{UUID}/uevent", f"{DEMO}/uevent", "bus/demo/uevent", "bus/demo/drivers/demo_drv/uevent"):
        assert world.write(path, "change\n") == 7
        with fails("EINVAL"):
            world.write(path, "dance")
    assert world.write(f"{DEMO}/{UUID}/power/control", "on\n") == 3
    with fails("EINVAL"):
        world.write(f"{DEMO}/{UUID}/power/control", "auto")


# -- parents that look like PCI functions ----------------------------------------------------------------------------------


def test_a_parent_that_looks_like_a_pci_function(mounts, client):
    tree = mounts("--pci", "demo0=0000:99:00.0,8086:1572")
    assert tree.ls("class/mdev_bus") == ["0000:99:00.0", "demo1", "twin0", "twin1"]
    assert tree.ls("class/demo") == ["demo1", "twin0", "twin1"]
    folder = "devices/pci0000:99/0000:99:00.0"
    assert (tree / "class/mdev_bus/0000:99:00.0").resolve(strict=True) == tree / folder
    assert (tree / "bus/pci/devices/0000:99:00.0").resolve(strict=True) == tree / folder
    assert (tree / f"{folder}/driver").resolve(strict=True) == tree / "bus/pci/drivers/demo"
    assert (tree / f"{folder}/subsystem").resolve(strict=True) == tree / "bus/pci"
    assert [tree.read(f"{folder}/{name}") for name in ("vendor", "device", "class")] == ["0x8086\n", "0x1572\n", "0x120000\n"]
    assert "PCI_SLOT_NAME=0000:99:00.0\n" in tree.read(f"{folder}/uevent")
    config = (tree / f"{folder}/config").read_bytes()
    assert (len(config), config[:4].hex(), (tree / f"{folder}/config").stat().st_size) == (256, "86807215", 256)
    tree.create(parent="0000:99:00.0")
    assert client.get(f"/v1/devices/{UUID}")["parent"] == "demo0"
    assert (tree / f"bus/mdev/devices/{UUID}").resolve(strict=True) == tree / folder / UUID
    assert not (tree / "devices/virtual/demo/demo0").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--pci", "demo0"], "is not PARENT=DDDD:BB:SS.F[,VENDOR:DEVICE]"),
        (["--pci", "nobody=0000:99:00.0"], "there is no parent 'nobody' (there are: demo0, demo1, twin0, twin1)"),
        (["--pci", "demo0=0000:99:00.0", "--pci", "demo1=0000:99:00.0"], "each parent has one PCI address"),
    ],
)
def test_what_cannot_look_like_a_pci_function_is_told(service, fuse, client, tmp_path, options, reason):
    done = service.mdevkit("sysfs", "mount", *options, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert reason in done.stderr
    assert not os.path.ismount(tmp_path)


# -- beginning and end -----------------------------------------------------------------------------------------------------


def test_mount_starts_the_service_and_returns_when_the_tree_is_there(service, fuse, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    done = service.mdevkit("sysfs", "mount", folder)
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (folder / "class/mdev_bus/demo0/label").read_text() == "none\n"
        again = service.mdevkit("sysfs", "umount", folder)
        assert (again.returncode, again.stderr) == (0, "")
        assert list(folder.iterdir()) == []
    finally:
        unmount(folder)


def test_umount_refuses_what_is_not_ours_and_what_is_busy(service, tree, tmp_path):
    for folder in (tmp_path, Path("/proc"), tmp_path / "nothing"):
        done = service.mdevkit("sysfs", "umount", folder)
        assert (done.returncode, done.stderr) == (1, f"{folder} is no mount of mdevkit sysfs [EINVAL]\n")
    with (tree / f"{DEMO}/label").open():
        busy = service.mdevkit("sysfs", "umount", tree.root)
        assert busy.returncode == 1
        assert "busy" in busy.stderr
        assert "(--lazy unmounts it nevertheless) [EBUSY]" in busy.stderr
        assert service.mdevkit("sysfs", "umount", "--lazy", tree.root).returncode == 0
        assert not os.path.ismount(tree.root)
    assert tree.process.wait(10) == 0


def test_what_cannot_be_mounted_on_is_told(service, fuse, client, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path / "nothing"):
        done = service.mdevkit("sysfs", "mount", path)
        assert (done.returncode, done.stderr) == (1, f"{path} is not a folder [ENOTDIR]\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_devices_go_on(tree, client, number):
    tree.create()
    tree.process.send_signal(number)
    assert tree.process.wait(10) == 0
    assert not os.path.ismount(tree.root)
    assert [device["uuid"] for device in client.get("/v1/devices")] == [UUID]


def test_umount_ends_the_process(tree):
    subprocess.run(["umount", tree.root], check=True)
    assert tree.process.wait(10) == 0


def test_a_killed_mount_can_be_unmounted(service, mounts, client):
    tree = mounts()
    tree.process.kill()
    tree.process.wait()
    with fails("ENOTCONN"):
        list(tree.root.iterdir())
    again = service.mdevkit("sysfs", "mount", tree.root)
    assert again.returncode == 1
    assert f"a mount whose process has died? mdevkit sysfs umount {tree.root}) [ENOTCONN]" in again.stderr
    assert service.mdevkit("sysfs", "umount", tree.root).returncode == 0
    assert list(tree.root.iterdir()) == []


def test_without_the_service_everything_says_eio_and_with_the_next_one_works_again(service, tree):
    tree.create()
    descriptor = os.open(tree / f"{DEMO}/{UUID}/speed", os.O_RDWR)
    service.kill_service()
    begun = time.monotonic()
    for attempt in (
        lambda: os.pread(descriptor, 10, 0),
        lambda: os.write(descriptor, b"1"),
        lambda: tree.ls("bus/mdev/devices"),
        lambda: (tree / f"bus/mdev/devices/{OTHER}").lstat(),
    ):
        with fails("EIO"):
            attempt()
    assert time.monotonic() - begun < 2
    service.start()
    assert tree.ls("bus/mdev/devices") == [UUID]
    assert os.pread(descriptor, 10, 0) == b"10\n"
    os.close(descriptor)
    wait_until(lambda: tree.said().count("following events") == 2, "the events' return")
    tree.write(f"{DEMO}/{UUID}/remove", "1")
    assert tree.ls("bus/mdev/devices") == []


def test_a_host_that_dies_fails_its_devices_only(service, tree):
    tree.create()
    tree.create(OTHER, parent="demo1")
    with suppress(OSError):
        tree.write(f"{DEMO}/{UUID}/crash", "9")
    assert tree.read(f"devices/virtual/demo/demo1/{OTHER}/speed") == "10\n"
    wait_until(lambda: reads(tree / f"{DEMO}/{UUID}/speed") == "10\n", "the host's return")
    assert tree.ls("bus/mdev/devices") == sorted([UUID, OTHER])


def reads(path):
    try:
        return path.read_text()
    except OSError as error:
        return errno.errorcode[error.errno]


def test_another_user_looks_and_cannot_touch(tree):
    tree.create()
    program = f"""
import os, pathlib
os.setgid(65534); os.setuid(65534)
root = pathlib.Path({str(tree / DEMO)!r})
print((root / "label").read_text().strip(), (root / "{UUID}/speed").read_text().strip())
for path in ("label", "mdev_supported_types/demo-small/create", "{UUID}/remove"):
    try:
        os.open(root / path, os.O_WRONLY)
    except OSError as error:
        print(error.errno)
"""
    # pytest's folders are for their owner only.
    for folder in [tree.root, *tree.root.parents]:
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o001 and folder != tree.root:
            folder.chmod(0o711)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["none", "10", *[str(errno.EACCES)] * 3]


# -- cost ------------------------------------------------------------------------------------------------------------------


def test_a_look_up_costs_the_same_with_many_devices(tree, client, capsys):
    """And a folder of n devices costs n."""

    def seconds(work, times):
        best = 9.0
        for _ in range(3):
            begun = time.perf_counter()
            for _ in range(times):
                work()
            best = min(best, (time.perf_counter() - begun) / times)
        return best

    tree.create()
    device = tree / f"bus/mdev/devices/{UUID}/mdev_type"
    count, look_ups, listings = 1, [], []
    for many in (100, 800):
        while count < many:
            count += 1
            client.post("/v1/devices", {"type": "demo-many", "parent": "demo1", "bind": False})
        assert len(tree.ls("bus/mdev/devices")) == many
        look_ups.append(seconds(lambda: device.stat(), 300))
        listings.append(seconds(lambda: tree.ls("bus/mdev/devices"), 3))
    told = f"look-up {look_ups[0] * 1e6:.0f} us with 100 devices, {look_ups[1] * 1e6:.0f} us with 800; listing"
    told += f" {listings[0] / 100 * 1e6:.0f} us per device with 100, {listings[1] / 800 * 1e6:.0f} us with 800"
    with capsys.disabled():
        sys.stdout.write(f"\n{told}\n")
    assert look_ups[1] < 2 * look_ups[0]
    assert listings[1] / 800 < 2 * listings[0] / 100
