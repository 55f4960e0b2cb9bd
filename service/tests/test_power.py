"""Suspend and resume through the API and the command line: one device, a parent, and everything over several hosts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.services import wait_until


def suspended(client):
    return {device["uuid"]: device["suspended"] for device in client.get("/v1/devices")}


@pytest.fixture
def devices(client):
    """Two devices of one host, and one of another."""
    return [client.post("/v1/devices", {"type": "demo-small", "parent": name})["uuid"] for name in ("demo0", "demo0", "demo1")]


def test_a_device_alone(client, devices):
    first, second, third = devices
    client.post("/v1/suspend", {"device": first})
    assert suspended(client) == {first: True, second: False, third: False}
    client.post("/v1/resume", {"device": first})
    assert not any(suspended(client).values())


def test_a_parent_with_its_devices(client, devices, refused):
    first, second, third = devices
    client.post("/v1/suspend", {"parent": "demo0"})
    assert suspended(client) == {first: True, second: True, third: False}
    refused("EBUSY", lambda: client.post("/v1/resume", {"device": first}), "demo0 is suspended; resume that")
    client.post("/v1/resume", {"parent": "demo0"})
    assert not any(suspended(client).values())


def test_everything_over_all_hosts(client, devices):
    client.post("/v1/suspend", {})
    assert all(suspended(client).values())
    client.post("/v1/resume", {})
    assert not any(suspended(client).values())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_that_refuses_leaves_everything_awake(client, devices, refused, place):
    client.put(f"/v1/devices/{devices[place]}/attributes/note", {"value": "awake"})
    refused("EBUSY", lambda: client.post("/v1/suspend", {}), devices[place], "has work to do")
    assert not any(suspended(client).values())
    client.put(f"/v1/devices/{devices[place]}/attributes/note", {"value": ""})
    client.post("/v1/suspend", {})
    assert all(suspended(client).values())


def parents(client):
    """Those with devices: the hosts of others end with their service."""
    return {name: client.get(f"/v1/parents?parent={name}")[0]["suspended"] for name in ("demo0", "demo1")}


def exchange_host(service, client, uuid):
    """Kill a device's host and wait for the next."""
    before = service.hosts()["demo0"]
    service.kill_host("demo0")
    wait_until(lambda: service.hosts().get("demo0") not in {None, before})
    assert client.get(f"/v1/devices/{uuid}")["state"] == "bound"


@pytest.mark.parametrize("what", ["everything", "a device"])
def test_what_is_suspended_stays_so_when_its_host_dies(service, client, devices, what):
    asked = {"everything": {}, "a device": {"device": devices[1]}}[what]
    client.post("/v1/suspend", asked)
    before = suspended(client), parents(client)
    exchange_host(service, client, devices[0])
    assert (suspended(client), parents(client)) == before
    # The next service learns it from the hosts.
    service.stop()
    service.start()
    with service.client() as later:
        exchange_host(service, later, devices[0])
        assert (suspended(later), parents(later)) == before
        later.post("/v1/resume", asked)
        exchange_host(service, later, devices[0])
        assert not any(suspended(later).values())
        assert not any(parents(later).values())


def test_a_device_that_was_woken_otherwise_is_not_suspended_again(service, client, devices):
    client.post("/v1/suspend", {"device": devices[0]})
    client.post(f"/v1/devices/{devices[0]}/unbind", {})
    client.post(f"/v1/devices/{devices[0]}/bind", {"driver": None})
    assert not any(suspended(client).values())
    exchange_host(service, client, devices[0])
    assert not any(suspended(client).values())


def test_a_new_device_with_the_uuid_of_a_suspended_one_runs(service, client, devices):
    client.post("/v1/suspend", {"device": devices[0]})
    client.delete(f"/v1/devices/{devices[0]}")
    client.post("/v1/devices", {"type": "demo-small", "parent": "demo0", "uuid": devices[0]})
    exchange_host(service, client, devices[0])
    assert not any(suspended(client).values())


def test_what_is_not_there_cannot_be_suspended(client, refused):
    refused("ENODEV", lambda: client.post("/v1/suspend", {"parent": "nobody"}), "there is no parent 'nobody'")
    refused("ENODEV", lambda: client.post("/v1/suspend", {"device": "00000000-0000-4000-8000-000000000000"}), "no device")


def test_the_commands(service, client, devices):
    def mdevkit(*words):
        command = [sys.executable, "-m", "mdevkit", *words]
        return subprocess.run(command, env=service.environment, capture_output=True, text=True, timeout=60, check=False)

    assert mdevkit("suspend", "demo0").returncode == 0
    assert list(suspended(client).values()) == [True, True, False]
    assert mdevkit("resume", "demo0").returncode == 0
    assert mdevkit("suspend", devices[2]).returncode == 0
    assert list(suspended(client).values()) == [False, False, True]
    assert mdevkit("resume", "--all").returncode == 0
    assert not any(suspended(client).values())
    wrong = mdevkit("suspend")
    assert (wrong.returncode, "a UUID, a parent or --all is wanted" in wrong.stderr) == (2, True)
    missing = mdevkit("suspend", "nobody")
    assert (missing.returncode, missing.stderr) == (1, "there is no device 'nobody' [ENODEV]\n")
