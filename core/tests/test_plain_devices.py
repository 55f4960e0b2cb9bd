"""Devices that are no mdevs: those that drivers add on a bus of their own, and children of others."""

from __future__ import annotations

import errno

from mdevkit import Device, State


def test_plain_devices_are_added_matched_and_taken_away(registry, kit, events, fails):
    net = kit.Taker("net", ("virtio0",))
    registry.register_driver(net)
    mdev = registry.create("card-1")
    child = Device("virtio0", "bench", mdev)
    registry.add_device(child)
    assert (child.state, child.driver, list(mdev.children), child.lock is mdev.lock) == ("bound", "net", ["virtio0"], True)
    assert fails(errno.EEXIST, registry.add_device, child) == "device virtio0 is already on bus bench"
    assert fails(errno.EEXIST, registry.add_device, Device("virtio0", "bench")) == "device virtio0 is already on bus bench"
    registry.del_device(child)
    assert (child.state, mdev.children, net.held) == ("gone", {}, {})
    assert fails(errno.ENODEV, registry.del_device, child) == "device virtio0 is gone"
    assert [action for action, _ in events(registry, "virtio0")] == ["add", "bind", "unbind", "remove"]


def test_a_plain_device_without_a_driver_stays_unbound(registry, fails):
    device = Device("lonely", "bench")
    assert fails(errno.EAGAIN, registry.del_device, device) == "device lonely is creating; try again"
    registry.add_device(device)
    assert device.state is State.UNBOUND
    assert "no such bus" not in fails(errno.ENODEV, registry.add_device, Device("x", "nowhere"))
    registry.del_device(device)


def test_a_plain_device_below_one_that_goes_is_refused(registry, fails):
    mdev = registry.create("card-1")
    registry.remove(mdev.uuid)
    text = fails(errno.ENODEV, registry.add_device, Device("late", "bench", mdev))
    assert text == f"device late: its parent {mdev} is gone"
    registry.add_device(Device("late", "bench"))  # the name is free


def test_children_go_with_their_parent(registry, caplog, events):
    mdev = registry.create("card-1")
    child = Device("child", "bench", mdev)
    grandchild = Device("grandchild", "bench", child)
    registry.add_device(child)
    registry.add_device(grandchild)
    registry.remove(mdev.uuid)
    assert [device.state for device in (mdev, child, grandchild)] == ["gone"] * 3
    assert events(registry)[-3:] == [("remove", "grandchild"), ("remove", "child"), ("remove", mdev.name)]
    assert f"device child is still there while {mdev} goes" in caplog.text
    assert mdev.children == child.children == {}
