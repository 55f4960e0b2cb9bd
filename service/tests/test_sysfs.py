"""The tree, really mounted over a real service: its structure, and what each file does."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time

import pytest

from tests.services import wait_until
from tests.sysfs import DEMO, OTHER, UUID, fails

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
    own = ["available_instances", "create", "description", "device_api", "devices", "name"]
    assert world.ls(f"{folder}/demo-big") == [*own, "vendor", "weight"]
    assert world.read(f"{folder}/demo-big/name") == "Big demo device\n"
    assert world.read(f"{folder}/demo-big/description") == "Big demo device\nfor tests\n"
    assert world.read(f"{folder}/demo-big/device_api") == "demo\n"
    assert world.read(f"{folder}/demo-big/available_instances") == "2\n"


def test_a_device(world):
    world.create()
    device = world / f"{DEMO}/{UUID}"
    own = ["driver", "driver_override", "iommu_group", "mdev_type", "power", "remove", "subsystem", "uevent"]
    vendors = [
        "assign",
        "assigned",
        "client",
        "count",
        "counts",
        "crash",
        "hang",
        "line",
        "moody",
        "note",
        "odd",
        "serial",
        "speed",
    ]
    assert world.ls(device) == sorted([*own, *vendors])
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
        wait_until(lambda: not os.path.lexists(world / f"bus/mdev/devices/{UUID}"), 1, "the device's end")


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


def test_attributes_of_types_are_read_and_stored_live(world, api):
    folder = f"{DEMO}/mdev_supported_types/demo-big"
    assert world.ls(f"{folder}/vendor") == ["revision"]
    assert world.read(f"{folder}/vendor/revision") == "3\n"
    with fails("EACCES"):
        world.write(f"{folder}/vendor/revision", "4")
    assert world.write(f"{folder}/weight", "7\n") == 2
    assert world.read(f"{folder}/weight") == "7\n"
    assert world.read(f"{DEMO}/mdev_supported_types/demo-small/weight") == "1\n"
    assert api.get("/v1/parents/demo0/types/demo-big/attributes/weight") == {"value": "7"}
    with fails("EINVAL"):
        world.write(f"{folder}/weight", "heavy")


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
