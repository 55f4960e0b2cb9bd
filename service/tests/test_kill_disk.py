"""A disk that is full, and a folder that cannot be written: clear errors, and nothing that was there is lost."""

from __future__ import annotations

import errno
import subprocess

import pytest

from tests.services import Running, wait_until

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "c4c5a1a3-2bd4-4f83-8c9e-0a55d0d1b0aa"


def mount(*words):
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs root and mounts: sudo ./dev test service/tests ({done.stderr.strip()})")


@pytest.fixture
def service(tmp_path_factory, tmp_path):
    """A service whose runtime folder is a file system of one megabyte."""
    folder = tmp_path_factory.mktemp("d")
    mount("-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(folder))
    running = Running(folder, tmp_path)
    yield running
    running.clean_up()
    wait_until(lambda: not running.hosts(), what="the hosts' end")
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Take all the room there is."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return folder / "filler"


def test_a_full_disk(service, refused):
    with service.start().client() as client:
        before = client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "parent": "demo0"})
        filler = fill(service.folder)
        path = f"{service.runtime}/devices/{OTHER}.new"
        error = refused("ENOSPC", lambda: client.post("/v1/devices", {"type": "demo-small", "uuid": OTHER}), path)
        assert "No space left on device" in str(error)
        refused(
            "ENOSPC",
            lambda: client.put(f"/v1/devices/{UUID}/attributes/note", {"value": "x" * 4000}),
            f"{service.runtime}/devices/{UUID}.tmp",
        )
        assert client.get("/v1/devices") == [before]
        # Neither of the two dies of it, together or one after the other.
        service.kill_host("demo0")
        wait_until(lambda: client.get("/v1/devices") == [before], what="the return on a full disk")
        filler.unlink()
        assert client.post("/v1/devices", {"type": "demo-small", "uuid": OTHER})["state"] == "bound"
    service.kill_service()
    service.start()
    with service.client() as again:
        assert [device["uuid"] for device in again.get("/v1/devices")] == [UUID, OTHER]
        (room,) = [type_ for type_ in again.get("/v1/parents?parent=demo0")[0]["types"] if type_["id"] == "demo-small"]
        assert room["available_instances"] == 6


@pytest.mark.parametrize("recorded", [True, False])
def test_a_service_that_starts_on_a_full_disk_keeps_what_runs(service, refused, recorded):
    path = f"/v1/devices/{UUID}"
    with service.start().client() as client:
        before = client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "parent": "demo0"})
        fill(service.folder)
        # The host has it, and the disk has not.
        refused("ENOSPC", lambda: client.put(f"{path}/attributes/note", {"value": "x" * 4000}), "No space left")
    service.kill_service()
    if not recorded:
        (service.runtime / "devices" / f"{UUID}.json").unlink()
        fill(service.folder)
    service.start()
    with service.client() as again:
        assert again.get("/v1/devices") == [before]
        assert again.get(f"{path}/attributes/note") == {"value": "x" * 4000}
        again.delete(path)
        assert again.get("/v1/devices") == []


def test_a_removal_needs_no_room(service):
    with service.start().client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
        fill(service.folder)
        client.delete(f"/v1/devices/{UUID}")
        assert client.get("/v1/devices") == []
    assert not [name for name in service.files() if name.startswith("devices/")]


def test_a_folder_that_cannot_be_written(service, refused):
    with service.start().client() as client:
        before = client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "parent": "demo0"})
        # The folder of the records alone: a file system in which a log is being written cannot become read-only.
        records = str(service.runtime / "devices")
        mount("--bind", records, records)
        mount("-o", "remount,bind,ro", records)
        refused("EROFS", lambda: client.post("/v1/devices", {"type": "demo-small"}), "/devices/", "Read-only file system")
        refused("EROFS", lambda: client.delete(f"/v1/devices/{UUID}"), f"/devices/{UUID}.json", "Read-only file system")
        assert client.get("/v1/devices") == [before]
        subprocess.run(["umount", records], check=True)
        client.delete(f"/v1/devices/{UUID}")
        assert client.get("/v1/devices") == []


def test_a_folder_nobody_can_write_in_when_the_service_starts(service):
    service.runtime.mkdir(mode=0o700)
    mount("-o", "remount,ro", str(service.folder))
    done = service.mdevkit("create", "demo-small")
    assert done.returncode == 1
    assert f"{service.runtime}/control.log cannot be written: Read-only file system" in done.stderr
    assert list(service.runtime.iterdir()) == []
