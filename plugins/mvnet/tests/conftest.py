"""Cards with a driver: rings and frames in a memfd, without any transport between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mdevkit_mvnet.model import MvnetDevice, SampleDevice
from mdevkit_testkit.suites.virtio.guest import Guest, NetPort
from mdevkit_virtio.netspec import NetFeature

#: What a driver accepts by default.
FEATURES = int(NetFeature.VERSION_1 | NetFeature.MRG_RXBUF | NetFeature.ACCESS_PLATFORM)
#: How long a test waits for frames, in seconds: the machine may be busy.
PATIENCE = 20


class Driver(Guest):
    """A driver of a card, with a port for each of its queue pairs."""

    ports: list[NetPort]

    def run(self, **options: Any) -> NetPort:
        """Start it; return its first port."""
        self.start(**options)
        self.ports = [NetPort(self, pair) for pair in range(len(self.queues) // 2)]
        return self.ports[0]


@pytest.fixture
def make_card(no_leaks: None) -> Iterator[Callable[..., MvnetDevice]]:
    """Make cards: ``make_card(pairs=2)``; ``compat="linux"`` is the sample's."""
    with contextlib.ExitStack() as stack:

        def make(compat: str = "none", **options: Any) -> MvnetDevice:
            kind = SampleDevice if compat == "linux" else MvnetDevice
            device = kind(name="card", mac=b"\2\0\0\0\0\1", **options)
            stack.callback(device.close)
            return device

        yield make


@pytest.fixture
def drive(make_card: Callable[..., MvnetDevice]) -> Iterator[Callable[..., Driver]]:
    """Give a driver to a device: ``drive(device, features=...)``."""
    with contextlib.ExitStack() as stack:

        def make(device: MvnetDevice, features: int = FEATURES, **options: Any) -> Driver:
            driver = Driver(device, features, **options)
            stack.callback(driver.close)
            return driver

        yield make


@pytest.fixture
def expect() -> Callable[..., list[bytes]]:
    """Wait for frames, and fail if fewer come."""

    def wait(port: NetPort, count: int) -> list[bytes]:
        frames = port.expect(count, PATIENCE)
        assert len(frames) == count
        return frames

    return wait
