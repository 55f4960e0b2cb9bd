"""Suspend and resume over every bus at once: the order, and a driver in the middle that refuses.

One card gives devices to three class buses; the virtio one has a virtio device below it, on a fourth. A wrapper of every hook notes
what is called, as any third party could.
"""

from __future__ import annotations

import errno

import pytest
from mdevkit import Driver, MdevError, Registry, hookimpl
from mdevkit.errors import ProbeDeferredError
from mdevkit_subfunction.driver import Mlx5SfDriver
from mdevkit_subfunction.parent import SubfunctionParent
from mdevkit_vdev.bus import VdevBus
from mdevkit_vfio.bus import VfioBus
from mdevkit_vfio.driver import VfioMdevDriver
from mdevkit_virtio.bus import VirtioMdevBus
from mdevkit_virtio.transport import VirtioMdevDriver
from mdevkit_virtio.virtio.bus import VirtioBus
from mdevkit_virtio.virtio.net import VirtioNetDriver

CARD = "0000:06:00.0"


class Notes:
    """Wraps the power hooks of all owners and notes the calls."""

    def __init__(self):
        self.calls = []
        self.refuse = None

    def _note(self, what, name):
        self.calls.append((what, name))
        if (what, name) == self.refuse:
            raise MdevError(errno.EBUSY, f"{name} is in the middle of something")

    @hookimpl(wrapper=True)
    def driver_suspend(self, device):
        self._note("driver suspend", device.bus)
        return (yield)

    @hookimpl(wrapper=True)
    def driver_resume(self, device):
        self._note("driver resume", device.bus)
        return (yield)

    @hookimpl(wrapper=True)
    def bus_suspend(self, device):
        self._note("bus suspend", device.bus)
        return (yield)

    @hookimpl(wrapper=True)
    def bus_resume(self, device):
        self._note("bus resume", device.bus)
        return (yield)

    @hookimpl(wrapper=True)
    def parent_suspend(self, parent):
        self._note("parent suspend", parent.name)
        return (yield)

    @hookimpl(wrapper=True)
    def parent_resume(self, parent):
        self._note("parent resume", parent.name)
        return (yield)


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def registry(notes, tmp_path):
    buses = [VfioBus(), VirtioMdevBus(), VirtioBus(), VdevBus()]
    drivers = [VfioMdevDriver(), VirtioMdevDriver(), VirtioNetDriver(), Mlx5SfDriver()]
    with Registry([notes, *buses, *drivers, SubfunctionParent()]) as registry:
        for flavour in ("mlx5", "virtio", "mdev"):
            registry.create(f"subfunction-{flavour}", endpoint_path=str(tmp_path / flavour))
        yield registry


#: Newest first, what is below a device before it, the driver before its bus; the parent at the end.
DOWN = [
    *[(f"{who} suspend", bus) for bus in ("mdev", "virtio", "mdev_virtio", "vdev") for who in ("driver", "bus")],
    ("parent suspend", CARD),
]
UP = [(what.replace("suspend", "resume"), name) for what, name in reversed(DOWN)]


@pytest.mark.parametrize("target", [None, CARD])
def test_children_before_parents_and_back(registry, notes, target):
    registry.suspend(target)
    assert notes.calls == DOWN
    assert all(mdev.suspended for mdev in registry.mdevs)
    notes.calls.clear()
    registry.resume(target)
    assert notes.calls == UP
    assert not any(mdev.suspended for mdev in registry.mdevs)


@pytest.mark.parametrize("place", range(len(DOWN)))
def test_whoever_refuses_everything_before_is_resumed(registry, notes, place):
    notes.refuse = DOWN[place]
    with pytest.raises(MdevError, match="is in the middle of something") as caught:
        registry.suspend()
    assert caught.value.errno == errno.EBUSY
    assert notes.calls[: place + 1] == DOWN[: place + 1]
    # A bus that refuses has its driver's part undone too; it never did its own.
    undone = [call for call in UP if (call[0].replace("resume", "suspend"), call[1]) in DOWN[:place]]
    assert notes.calls[place + 1 :] == undone
    assert not any(mdev.suspended for mdev in registry.mdevs)
    notes.refuse, notes.calls = None, []
    registry.suspend()
    assert notes.calls == DOWN


def test_one_device_with_what_is_below_it(registry, notes):
    virtio = next(mdev for mdev in registry.mdevs if mdev.bus == "mdev_virtio")
    registry.suspend(virtio.uuid)
    assert notes.calls == DOWN[2:6]
    assert [mdev.suspended for mdev in registry.mdevs] == [mdev is virtio for mdev in registry.mdevs]


# -- probes that fail, as Linux's driver core sees them (drivers/base/dd.c) ----------------------------------------------


class Picky(Driver):
    """Comes before mlx5_sf by name, and fails as it is told."""

    name, bus, id_table = "a_picky_one", "vdev", ("subfunction.sf",)

    def __init__(self, failure):
        self.failure = failure

    @hookimpl
    def driver_probe(self, device):
        if self.failure is not None:
            raise self.failure

    @hookimpl
    def driver_remove(self, device):
        pass


def world(*drivers):
    return Registry([VdevBus(), SubfunctionParent(), *drivers])


@pytest.mark.parametrize("failure", [MdevError(errno.ENODEV, "not mine"), MdevError(errno.EIO, "broken"), RuntimeError("a bug")])
def test_after_a_failed_probe_the_next_driver_is_tried(failure):
    with world(Picky(failure), Mlx5SfDriver()) as registry:
        mdev = registry.create("subfunction-mlx5")
        assert (mdev.driver, str(mdev.state)) == ("mlx5_sf", "bound")


@pytest.mark.parametrize(
    ("failure", "number", "text"),
    [
        (MdevError(errno.ENODEV, "not mine"), errno.ENODEV, "not mine"),
        (RuntimeError("a bug"), errno.EIO, "a bug"),
    ],
)
def test_a_create_whose_only_driver_fails_is_rolled_back(failure, number, text):
    with world(Picky(failure)) as registry:
        with pytest.raises(MdevError, match=text) as caught:
            registry.create("subfunction-mlx5")
        assert caught.value.errno == number
        assert registry.mdevs == []
        assert registry.type("subfunction-mlx5").available_instances == 64


def test_a_deferred_probe_waits_for_any_other_bind(tmp_path):
    picky = Picky(ProbeDeferredError("firmware is not up"))
    with world(picky) as registry:
        waiting = registry.create("subfunction-mlx5")
        assert (str(waiting.state), waiting.driver, waiting.error.errno) == ("deferred", None, 517)
        picky.failure = None
        other = registry.create("subfunction-mlx5")
        assert {str(other.state), str(waiting.state)} == {"bound"}
