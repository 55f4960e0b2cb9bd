"""The bus ``virtio``: ids, negotiation, FAILED, and the order of suspend and resume, with drivers that note what they see."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from mdevkit import Driver, MdevError, hookimpl
from mdevkit_virtio.bus import VirtioMdevBus
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.ops import Status
from mdevkit_virtio.transport import VirtioMdevDriver
from mdevkit_virtio.virtio.bus import VirtioBus, VirtioDriver
from mdevkit_virtio.virtio.irq import EventFd, InterruptThread


class Noting(VirtioDriver):
    """Takes any network device and notes the status at each step; `fail` raises at one of them."""

    name = "noting"
    id_table = ("d00000001v",)
    feature_table = (3, 5)

    def __init__(self):
        self.seen = []
        self.fail = {}

    def _note(self, step, device):
        self.seen.append((step, int(device.status)))
        if step in self.fail:
            raise self.fail[step]

    def validate(self, device):
        self._note("validate", device)
        device.features &= ~(1 << 3)

    def probe(self, device):
        self._note("probe", device)

    def remove(self, device):
        self._note("remove", device)
        device.reset()

    def config_changed(self, device):
        self._note("config", device)

    def freeze(self, device):
        self._note("freeze", device)

    def restore(self, device):
        self._note("restore", device)


@pytest.fixture
def noting():
    return Noting()


@pytest.fixture
def lab(labs, noting):
    return labs(VirtioMdevBus(), VirtioBus(), VirtioMdevDriver(), noting)


def statuses(mdev):
    return [call[1] for call in mdev.drvdata.calls if call[0] == "set_status"]


def test_the_status_at_each_step(lab, noting):
    mdev = lab.create()
    assert statuses(mdev) == [0, 1, 3, 11, 15]
    lab.registry.unbind(mdev.name)
    assert noting.seen == [("validate", 3), ("probe", 11), ("remove", 15)]
    assert statuses(mdev) == [0, 1, 3, 11, 15, 0, 1]


def test_features_are_those_both_sides_know(lab, noting):
    mdev = lab.create()
    virtio = mdev.endpoint.device
    given = [call[1] for call in mdev.drvdata.calls if call[0] == "set_features"]
    assert given == [Feature.VERSION_1 | 1 << 3 | 1 << 5, Feature.VERSION_1 | 1 << 5], "once more after validate has changed them"
    assert virtio.features == given[-1]
    assert virtio.has(5)
    assert not virtio.has(3)


@pytest.mark.parametrize("step", ["validate", "probe"])
def test_what_fails_is_failed(lab, noting, step):
    noting.fail[step] = MdevError(errno.ENODEV, "not mine")
    mdev = lab.create()
    assert statuses(mdev)[-1] & Status.FAILED
    assert "not mine" in mdev.endpoint.describe()["error"]
    noting.fail.clear()
    lab.registry._core.attach(mdev.endpoint.device)
    assert mdev.endpoint.device.driver == "noting"
    assert statuses(mdev)[-5:] == [0, 1, 3, 11, 15], "reset before the next driver tries (virtio 1.2, 3.1.1)"


def test_a_failure_that_is_one_fails_the_bind(lab, noting):
    noting.fail["probe"] = MdevError(errno.ENOMEM, "no memory")
    mdev = lab.create(bind=False)
    with pytest.raises(MdevError, match="no memory") as caught:
        lab.registry.attach(mdev.name)
    assert caught.value.errno == errno.ENOMEM
    assert not mdev.children
    noting.fail.clear()
    lab.registry.attach(mdev.name)


def test_suspend_and_resume(lab, noting):
    mdev = lab.create()
    model = mdev.drvdata.ops
    lab.registry.suspend()
    model.update_config(status=0)
    assert noting.seen[-1] == ("freeze", 15), "no configuration interrupt while suspended"
    lab.registry.resume()
    assert noting.seen[-1] == ("restore", 11)
    assert statuses(mdev)[-5:] == [0, 1, 3, 11, 15]


def test_a_refused_suspend_changes_nothing(lab, noting):
    noting.fail["freeze"] = MdevError(errno.EBUSY, "busy")
    mdev = lab.create()
    before = statuses(mdev)
    with pytest.raises(MdevError, match="busy"):
        lab.registry.suspend()
    assert statuses(mdev) == before
    assert not mdev.suspended


def test_a_restore_that_fails_is_told_to_the_device(lab, noting):
    noting.fail["restore"] = MdevError(errno.EIO, "no way")
    mdev = lab.create()
    lab.registry.suspend()
    with pytest.raises(MdevError, match="no way"):
        lab.registry.resume()
    assert statuses(mdev)[-1] == 11 | Status.FAILED


@pytest.mark.parametrize(
    ("entry", "taken"),
    [("d00000001v", True), ("d00000001v00000000", True), ("d00000002v", False), ("d00000001v00001AF4", False)],
)
def test_ids_match_as_linux_matches_them(labs, noting, entry, taken):
    noting.id_table = (entry,)
    lab = labs(VirtioMdevBus(), VirtioBus(), VirtioMdevDriver(), noting)
    assert (lab.create().endpoint.device.driver == "noting") is taken


def test_a_legacy_device_is_left_alone(lab, noting):
    mdev = lab.create(lambda name: lab.loop(1 << 5, name=name))
    assert "device virtio0 is a legacy device: it does not offer VIRTIO_F_VERSION_1" in mdev.endpoint.describe()["error"]
    assert noting.seen == []


class Plain(Driver):
    name, bus, id_table = "plain", "virtio", ("d00000001v",)

    @hookimpl
    def driver_probe(self, device):
        raise AssertionError("never reached")

    @hookimpl
    def driver_remove(self, device):
        pass


def test_a_driver_that_is_no_virtio_driver(labs):
    lab = labs(VirtioMdevBus(), VirtioBus(), VirtioMdevDriver(), Plain())
    with pytest.raises(MdevError, match="driver plain is no virtio driver") as caught:
        lab.create()
    assert caught.value.errno == errno.EINVAL


def test_configuration_that_never_stands_still(lab):
    virtio = lab.create().endpoint.device
    numbers = iter(range(1000))
    virtio.transport.generation = lambda: next(numbers)
    with pytest.raises(MdevError, match="the configuration of device virtio0 changes faster than it can be read") as caught:
        virtio.read_config(0, 6)
    assert caught.value.errno == errno.EIO


def test_interrupts_come_one_at_a_time_on_their_thread(wait_until):
    thread = InterruptThread("irq")
    seen = []
    first = EventFd(thread, lambda: seen.append((thread.current, threading.current_thread().name)))
    failing = EventFd(thread, lambda: 1 // 0)
    thread.start()
    os.eventfd_write(failing.fd, 1)
    os.eventfd_write(first.fd, 1)
    wait_until(lambda: seen)
    assert seen == [(True, "irq")]
    caught = []

    def end():
        try:
            thread.close()
        except MdevError as error:
            caught.append(error)

    thread.post(end)
    wait_until(lambda: caught)
    assert caught[0].errno == errno.EDEADLK
    with thread.paused():
        os.eventfd_write(first.fd, 1)
        assert len(seen) == 1
    wait_until(lambda: len(seen) == 2)
    first.close()
    failing.close()
    thread.close()
    thread.close()
