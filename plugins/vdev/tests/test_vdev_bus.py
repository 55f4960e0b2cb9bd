"""The vendor-neutral bus with a parent and drivers of its own, in one process."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from mdevkit import Driver, MdevError, MdevType, ParentOps, Registry, State, hookimpl
from mdevkit.errors import ProbeDeferredError
from mdevkit_vdev.bus import VDEV, VdevBus, VdevMdev


class Card(ParentOps):
    name = "0000:06:00.0"
    driver_name = "acme_core"

    def __init__(self, match="sf"):
        self.match, self.types = match, (MdevType("sf", "vdev", "acme-sf"),)

    @hookimpl
    def parent_create(self, mdev, params):
        VdevMdev.from_device(mdev).set_match(self.match, data=self)

    @hookimpl
    def parent_remove(self, mdev):
        pass


class SfDriver(Driver):
    name, bus, id_table = "acme_sf", "vdev", ("acme_core.sf",)

    def __init__(self, calls=None, fails=None):
        self.calls, self.fails = calls if calls is not None else [], fails

    @hookimpl
    def driver_probe(self, device):
        self.calls.append(("probe", VdevMdev.from_device(device).data))
        if self.fails:
            raise self.fails

    @hookimpl
    def driver_remove(self, device):
        self.calls.append(("remove",))

    @hookimpl
    def driver_suspend(self, device):
        self.calls.append(("suspend",))

    @hookimpl
    def driver_resume(self, device):
        self.calls.append(("resume",))


class Other(SfDriver):
    name, id_table = "other", ("acme_core.eth",)


def fails(number, call, *args, **kwargs):
    with pytest.raises(MdevError) as caught:
        call(*args, **kwargs)
    assert caught.value.errno == number
    return caught.value.strerror


def test_a_device_is_matched_by_its_parents_driver_and_a_name():
    card, driver, other = Card(), SfDriver(), Other()
    with Registry([VdevBus(), other, driver, card]) as registry:
        mdev = registry.create("acme_core-sf")
        assert mdev.modalias == "vdev:acme_core.sf"
        assert mdev.uevent()["MODALIAS"] == "vdev:acme_core.sf"
        assert (mdev.driver, mdev.class_id, mdev.state) == ("acme_sf", VDEV, State.BOUND)
        registry.suspend(mdev.uuid)
        registry.resume(mdev.uuid)
        registry.unbind(mdev.uuid)
        registry.bind(mdev.uuid, "acme_sf")
    assert [name for name, *_ in driver.calls] == ["probe", "suspend", "resume", "remove", "probe", "remove"]
    assert driver.calls[0] == ("probe", card)
    assert other.calls == []


@pytest.mark.parametrize("name", ["", "a.b", "sf*", "sf\n", "ä"])
def test_a_match_name_must_fit_into_an_alias(name):
    with Registry([VdevBus(), Card(name)]) as registry:
        text = fails(errno.EINVAL, registry.create, "acme_core-sf", bind=False)
        assert "is not made of letters, digits, _ and -" in text


def test_the_name_is_set_once_and_inside_create():
    with Registry([VdevBus(), Card()]) as registry:
        mdev = registry.create("acme_core-sf", bind=False)
        assert "already set" in fails(errno.EBUSY, mdev.set_match, "sf")


def test_another_buss_device_is_none_of_this_bus():
    with Registry([VdevBus(), Card()]) as registry:
        mdev = registry.create("acme_core-sf", bind=False)
        assert VdevMdev.from_device(mdev) is mdev
        assert "not on vdev" in fails(errno.ENODEV, VdevMdev.from_device, registry_stranger())


def registry_stranger():
    from mdevkit.device import Device

    return Device("x", "mdev")


@pytest.mark.parametrize(
    ("failure", "state", "reported"),
    [
        (MdevError(errno.ENODEV, "not mine"), State.UNBOUND, errno.ENODEV),
        (ProbeDeferredError("the card's firmware is not up"), State.DEFERRED, 517),
        (RuntimeError("a bug"), State.UNBOUND, errno.EIO),
    ],
)
def test_a_failing_probe_leaves_the_state_of_linuxs_driver_core(failure, state, reported):
    driver = SfDriver(fails=failure)
    with Registry([VdevBus(), driver, Card()]) as registry:
        mdev = registry.create("acme_core-sf", bind=False)
        with suppress(MdevError):
            registry.attach(mdev.uuid)
        assert (mdev.state, mdev.driver, mdev.error.errno) == (state, None, reported)
        driver.fails = None
        if state is State.UNBOUND:
            registry.bind(mdev.uuid, "acme_sf")
        else:
            registry.register_driver(Other())
            other = registry.create("acme_core-sf")  # any successful bind tries the deferred again
            assert other.state is State.BOUND
        assert mdev.state is State.BOUND
