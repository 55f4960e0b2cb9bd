"""The driver ``virtio_mdev``: the calls a device gets, their order, what it may refuse, and the life of its virtio device."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from mdevkit import Driver, MdevError, State, hookimpl
from mdevkit_virtio.bus import VirtioMdevBus
from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.transport import VirtioMdevDriver, VirtioMdevEndpoint
from mdevkit_virtio.virtio.bus import VirtioBus, VirtioDriver
from mdevkit_virtio.virtio.vring import MAX_MEMORY, QueueRequest

PATIENCE = 20


def names(mdev, *wanted):
    return [call for call in mdev.drvdata.calls if call[0] in wanted]


def test_the_calls_of_a_probe_and_their_order(lab):
    mdev = lab.create()
    calls = [call for call in mdev.drvdata.calls if call[0] not in {"get_status", "get_generation", "get_config", "kick_vq"}]
    setup = [
        *("set_vq_cb", "set_vq_num", "set_vq_address", "set_vq_ready"),
        *("set_vq_cb", "set_vq_num", "set_vq_address", "set_vq_ready"),
    ]
    assert [call[0] for call in calls] == [
        *("get_device_id", "get_vendor_id", "set_status", "set_status", "set_status", "get_features", "set_features", "set_status"),
        *("get_vq_num_max", "get_vq_ready", "get_vq_num_max", "get_vq_ready", "get_vq_align", "set_map"),
        *setup,
        *("set_config_cb", "set_status"),
    ]
    assert [call[1] for call in names(mdev, "set_status")] == [0, 1, 3, 11, 15]
    assert [call[1:] for call in names(mdev, "set_vq_ready")] == [(0, True), (1, True)]
    before = mdev.drvdata.calls[: mdev.drvdata.calls.index(("set_status", 15))]
    assert "kick_vq" not in {call[0] for call in before}, "no kick before DRIVER_OK (virtio 1.2, 3.1.1)"


def test_the_calls_of_a_remove(lab):
    mdev = lab.create()
    mdev.drvdata.calls.clear()
    lab.registry.unbind(mdev.name)
    calls = [call for call in mdev.drvdata.calls if call[0] != "get_status"]
    assert calls[0] == ("set_status", 0)
    assert [call[0] for call in calls[1:]] == [
        *("set_vq_ready", "get_vq_ready", "set_vq_cb", "set_vq_ready", "get_vq_ready", "set_vq_cb", "set_config_cb", "set_map"),
        "set_status",
    ]
    assert not mdev.drvdata.ops._table.regions
    assert mdev.drvdata.ops.get_status() == 1, "acknowledged anew for the next driver"


def test_the_virtio_device_is_where_linux_has_it(lab):
    mdev = lab.create()
    virtio = mdev.endpoint.device
    assert (virtio.name, virtio.bus, virtio.parent, virtio.driver) == ("virtio0", "virtio", mdev, "virtio_net")
    assert virtio.modalias == "virtio:d00000001v00000000"
    assert mdev.children == {"virtio0": virtio}
    assert virtio.transport.bus_name == mdev.name
    second = lab.create()
    assert second.endpoint.device.name == "virtio1"
    lab.registry.remove(mdev.name)
    assert virtio.state is State.GONE
    assert lab.create().endpoint.device.name == "virtio0", "numbers are used again"


def test_the_facts_are_those_of_the_netdev(lab):
    mdev = lab.create()
    facts = dict(mdev.endpoint.describe())
    assert facts.pop("socket") == f"{lab.folder}/0.sock"
    assert facts == {
        "kind": "netdev",
        "device": "virtio0",
        "client": "",
        "name": "eth0",
        "mac": "02:00:00:00:00:42",
        "mtu": "1500",
        "carrier": "up",
        "queue_pairs": "1",
    }
    assert list(mdev.endpoint.attach("qemu")) == [
        *("-netdev", f"stream,id=net-{mdev.name[:8]},server=off,addr.type=unix,addr.path={lab.folder}/0.sock"),
        *("-device", f"virtio-net-pci,netdev=net-{mdev.name[:8]},mac=02:00:00:00:00:42"),
    ]
    assert mdev.endpoint.attach("libvirt")[0] == "<qemu:commandline>"
    with pytest.raises(MdevError, match="dpdk cannot use a netdev; bind the device to vhost_mdev") as caught:
        mdev.endpoint.attach("dpdk")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_without_a_driver_for_it_the_device_says_so(labs):
    lab = labs(VirtioMdevBus(), VirtioBus(), VirtioMdevDriver())
    mdev = lab.create()
    assert (mdev.state, mdev.driver) == (State.BOUND, "virtio_mdev")
    facts = mdev.endpoint.describe()
    assert (facts["kind"], facts["device"], facts["client"]) == ("virtio", "virtio0", "")
    assert facts["error"].startswith(
        "device virtio0 has no driver: device virtio0: no driver for virtio:d00000001v00000000 is installed"
    )
    with pytest.raises(MdevError, match="qemu cannot use device virtio0, which has no driver"):
        mdev.endpoint.attach("qemu")
    lab.registry.unbind(mdev.name)


def test_a_device_that_is_none_is_refused(lab):
    ops = lab.parent.make("x")
    with pytest.raises(MdevError, match="is no virtio device: its device id is 0") as caught:
        lab.create(lambda name: type("NoDevice", (type(ops),), {"device_id": 0})(name=name))
    assert caught.value.errno == errno.ENODEV
    assert not lab.registry.mdevs


@pytest.mark.parametrize(
    ("op", "raised", "number", "text"),
    [
        ("set_features", (errno.EINVAL, "not without bit 33"), errno.EINVAL, "not without bit 33"),
        ("set_vq_address", (errno.EFAULT, "not there"), errno.EINVAL, r"queue 0 \(input.0\): not there"),
        ("set_vq_num", (errno.EINVAL, "too many"), errno.EINVAL, "too many"),
        ("set_vq_ready", (errno.EFAULT, "no memory"), errno.EFAULT, "no memory"),
        ("set_map", (errno.ENOMEM, "no table"), errno.ENOMEM, "no table"),
        ("get_config", (errno.EIO, "a bug"), errno.EIO, "a bug"),
    ],
)
def test_a_device_that_refuses_fails_the_create(lab, op, raised, number, text):
    lab.parent.refuse[op] = MdevError(*raised)
    with pytest.raises(MdevError, match=text) as caught:
        lab.create()
    assert caught.value.errno == number
    assert not lab.registry.mdevs
    assert not list(lab.folder.iterdir())


def test_a_device_that_refuses_the_features_is_failed_and_left_without_a_driver(lab):
    mdev = lab.create(bind=False)
    plain = mdev.drvdata.ops.get_status
    mdev.drvdata.ops.get_status = lambda: plain() & ~8
    lab.registry.attach(mdev.name)
    facts = mdev.endpoint.describe()
    assert facts["error"].startswith("device virtio0 has no driver: device virtio0 refuses features 0x100010028 (status 0x3)")
    assert mdev.drvdata.calls[-1] == ("set_status", 0x83)


def test_a_queue_that_is_not_there_or_set_up_already(lab):
    def make(name):
        model = lab.loop(name=name)
        model._queues.pop()
        return model

    mdev = lab.create(make, bind=False)
    with pytest.raises(MdevError, match=rf"{mdev.name} has no queue 1 \(output.0\)") as caught:
        lab.registry.attach(mdev.name)
    assert caught.value.errno == errno.ENOENT
    mdev = lab.create(lambda name: lab.loop(name=name))
    virtio = mdev.endpoint.device
    with pytest.raises(MdevError, match=rf"{mdev.name}: queue 0 \(input.0\) is set up already") as caught:
        virtio.find_vqs([QueueRequest("input.0"), QueueRequest("output.0")])
    assert caught.value.errno == errno.ENOENT


def test_large_rings_are_made_shorter_until_they_fit(lab, engine):
    netdev = lab.netdev(num=32768, mtu=65000, engine=engine)
    size = netdev._tx[0].queue.num
    assert 256 <= size < 32768
    assert netdev._tx[0].queue.ring.memory.size <= MAX_MEMORY
    big = (b"\xff" * 12 + b"\x88\xb5").ljust(65014, b"x")
    with netdev.frames() as frames:
        netdev.send(big)
        assert frames.get(PATIENCE) == big


def test_queues_without_a_name_are_left_out(lab):
    """As in virtio_vdpa: the device's index counts named queues only."""
    taken = []

    class Picky(VirtioDriver):
        name = "picky"
        id_table = ("d00000001v",)

        def probe(self, device):
            taken.extend(device.find_vqs([QueueRequest(None), QueueRequest("one"), QueueRequest(None), QueueRequest("two")]))
            return

        def remove(self, device):
            device.reset()
            device.del_vqs()

    lab.registry.unregister_driver("virtio", "virtio_net")
    lab.registry.register_driver(Picky())
    mdev = lab.create()
    assert [queue and (queue.name, queue.index) for queue in taken] == [None, ("one", 0), None, ("two", 1)]
    assert mdev.drvdata.ops.get_status() == 15, "the bus makes ready what its driver has not"


def test_no_option_of_the_rings_is_accepted_that_ours_have_not(lab):
    mdev = lab.create(lambda name: lab.loop(Feature.VERSION_1 | Feature.IN_ORDER | 1 << 37 | 1 << 33 | 1 << 3, name=name))
    assert mdev.endpoint.device.features == Feature.VERSION_1 | 1 << 33 | 1 << 3


def test_a_path_that_cannot_be_used_fails_the_create(lab):
    with pytest.raises(MdevError, match="cannot listen at /no/such/folder/x: the folder /no/such/folder does not exist") as caught:
        lab.registry.create("loop-virtio", endpoint_path="/no/such/folder/x")
    assert caught.value.errno == errno.ENOENT
    assert not lab.registry.mdevs


def test_a_program_at_the_socket_holds_the_device(lab, wait_until):
    mdev = lab.create()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(mdev.endpoint.describe()["socket"])
        wait_until(lambda: mdev.endpoint.describe()["client"])
        with pytest.raises(MdevError, match=rf"netdev eth0 is in use by pid {os.getpid()} \(") as caught:
            lab.registry.remove(mdev.name, timeout=0.05)
        assert caught.value.errno == errno.EBUSY
        assert mdev.state is State.BOUND
        lab.registry.remove(mdev.name, force=True)
        assert peer.recv(1) == b""
    assert mdev.state is State.GONE


class Claims(Driver):
    """Another driver of the class bus, to move devices to."""

    name = "claims"
    bus = VirtioMdevBus.name

    @hookimpl
    def driver_probe(self, device):
        self.status = device.get_ops().get_status()

    @hookimpl
    def driver_remove(self, device):
        pass


def test_a_device_of_the_other_class_is_taken_by_override(lab):
    other = Claims()
    lab.registry.register_driver(other)
    mdev = lab.registry.create("loop-vhost", endpoint_path=f"{lab.folder}/x.sock", bind=False)
    with pytest.raises(MdevError, match="virtio_mdev does not match mdev_virtio:c02; driver_override would make it"):
        lab.registry.bind(mdev.name, "virtio_mdev")
    for _ in range(3):
        lab.registry.bind(mdev.name, "virtio_mdev", override=True)
        netdev = mdev.endpoint.device.endpoint.netdev
        one = (b"\xff" * 12 + b"\x88\xb5").ljust(60)
        with netdev.frames() as frames:
            netdev.send(one)
            assert frames.get(PATIENCE) == one
        lab.registry.unbind(mdev.name)
        lab.registry.bind(mdev.name, "claims", override=True)
        lab.registry.unbind(mdev.name)


def test_memory_goes_back_to_the_device_before_it_is_closed(lab, monkeypatch):
    seen = []
    close = GuestMemory.close
    mdev = lab.create()
    monkeypatch.setattr(GuestMemory, "close", lambda self: (seen.append(mdev.drvdata.ops._table.regions), close(self)))
    lab.registry.unbind(mdev.name)
    assert seen == [()]


def test_the_memory_is_gone_with_the_driver(lab):
    before = memory()
    mdev = lab.create()
    with mdev.endpoint.device.endpoint.netdev.frames() as frames:
        mdev.endpoint.device.endpoint.netdev.send((b"\xff" * 12 + b"\x88\xb5").ljust(60))
        frames.get(PATIENCE)
    ours = memory() - before
    assert ours
    lab.registry.unbind(mdev.name)
    assert not ours & memory(), "it goes at once, and not when garbage is collected"


def memory():
    """Return the inodes of memory of virtio devices that is mapped (proc_pid_maps(5))."""
    return {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:virtio" in line}


def test_a_driver_that_goes_while_it_is_asked(lab):
    """Each question looks at the endpoint once: the next look may find none."""
    device = lab.create().endpoint.device

    class Leaving:
        name, driver = device.name, device.driver

        def __init__(self):
            self.left = [device.endpoint]

        @property
        def endpoint(self):
            return self.left.pop() if self.left else None

    assert VirtioMdevEndpoint(Leaving()).describe()["kind"] == "netdev"
    assert VirtioMdevEndpoint(Leaving()).attach("qemu")
