"""How a mount of the tree begins, lasts and ends, whatever becomes of service and hosts; and what look-ups cost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.services import wait_until
from tests.sysfs import DEMO, OTHER, UUID, fails, reads, unmount


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
    wait_until(lambda: tree.said().count("following events") == 2, what="the events' return")
    tree.write(f"{DEMO}/{UUID}/remove", "1")
    assert tree.ls("bus/mdev/devices") == []


def test_a_host_that_dies_fails_its_devices_only(service, tree):
    tree.create()
    tree.create(OTHER, parent="demo1")
    with suppress(OSError):
        tree.write(f"{DEMO}/{UUID}/crash", "9")
    assert tree.read(f"devices/virtual/demo/demo1/{OTHER}/speed") == "10\n"
    wait_until(lambda: reads(tree / f"{DEMO}/{UUID}/speed") == "10\n", what="the host's return")
    assert tree.ls("bus/mdev/devices") == sorted([UUID, OTHER])


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
