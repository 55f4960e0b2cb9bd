"""A thousand devices: nothing costs more for it but what has to name them all."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree

import pytest

from tests.services import Running, wait_until


@pytest.fixture
def service(tmp_path):
    """A service whose runtime folder is in memory, where systemd and XDG have it."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    running = Running(folder, tmp_path)
    yield running
    running.clean_up()
    rmtree(folder)


def median(call, times):
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def create(client):
    return client.post("/v1/devices", {"type": "demo-many", "parent": "demo0"})["uuid"]


def test_a_thousand_devices(client):
    few = [create(client) for _ in range(100)]
    small = min(median(lambda: client.get("/v1/devices"), 5) for _ in range(3))
    many = [create(client) for _ in range(900)]
    ratios = []

    def cheap():
        ratios.append(median(lambda: create(client), 100) / median(lambda: client.get("/v1/version"), 100))
        return min(ratios) <= 5

    # Other processes on this machine can make it look dearer than it is, never cheaper.
    wait_until(cheap, seconds=30, what=f"a create for at most 5 GETs ({ratios})")
    for uuid in [device["uuid"] for device in client.get("/v1/devices")][1000:]:
        client.delete(f"/v1/devices/{uuid}")
    large = min(median(lambda: client.get("/v1/devices"), 5) for _ in range(3))
    slope = (large - small) / 900
    sys.stderr.write(f"\ncreate beside 1,000: {min(ratios):.1f} x GET version; list: {slope * 1e6:.1f} us a device\n")
    # Linear: ten times as many take at most ten times as long, and half as much again for the noise.
    assert large < 15 * small
    assert {device["uuid"] for device in client.get("/v1/devices")} == {*few, *many}
