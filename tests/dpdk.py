"""Finds the testpmds that tests run: Debian 12's DPDK 22.11 where it is installed, and the 24.11 of the Debian root."""

from __future__ import annotations

import shutil

import pytest

from tests.guests.root import DPDK, find_root, loader

VERSIONS = ("22.11", "24.11")


def testpmd(version: str) -> list[str]:
    """Return the command line of a testpmd, up to EAL's options; skips with the command that gets it."""
    if version == "22.11":
        installed = shutil.which("dpdk-testpmd")
        if installed is None:
            pytest.skip("no dpdk-testpmd: apt-get install -y --no-install-recommends dpdk dpdk-dev")
        return [installed]
    root = find_root(DPDK)
    if root is None:
        pytest.skip("no DPDK 24.11: ./dev guests")
    # Its drivers are loaded from a folder that is compiled in, and is another one here.
    drivers = next((root / "usr/lib/x86_64-linux-gnu/dpdk").glob("pmds-*"))
    wanted = [f"-d{drivers}/librte_{name}.so" for name in ("bus_vdev", "mempool_ring", "net_virtio", "net_vhost")]
    return [*loader(root, "dpdk-testpmd"), str(root / "usr/bin/dpdk-testpmd"), *wanted]
