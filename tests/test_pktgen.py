"""``mdevkit pktgen`` and ``bind --override`` as a person uses them: the mvnet loopback in the foreground and in the service."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mdevkit_virtio.pktgen.cli import _print
from mdevkit_virtio.pktgen.generator import Result

from tests.services import foreground, private_service, wait_until

MDEVKIT = Path(sys.executable).with_name("mdevkit")
UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a0cc"
PACKAGES = "mdevkit-mvnet,mdevkit-virtio,mdevkit-mtty,mdevkit-vfio,mdevkit-service"


@pytest.fixture
def service():
    with private_service(PACKAGES) as running:
        yield running


@pytest.fixture
def run(service):
    """Starts a device in the foreground and returns its facts."""
    with foreground(service, UUID) as start:
        yield lambda *words: start(*words)[1]


def generate(service, *words):
    """Run pktgen and return what it says in JSON."""
    done = service.mdevkit("pktgen", UUID, "--json", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("type_id", ["mvnet_loopback-virtio", "mvnet_loopback-vhost"])
def test_every_frame_comes_back(service, run, type_id):
    run(type_id)
    result = generate(service, "--count", "3000", "--size", "60,1514,777")
    assert result["uuid"] == UUID
    assert (result["sent"], result["received"], result["lost"], result["corrupt"]) == (3000, 3000, 0, 0)
    assert result["received_bytes"] == 1000 * (60 + 1514 + 777)
    assert result["rate"] > 0
    assert result["latency_us"]["p50"] > 0


def test_what_is_printed_for_people(service, run):
    run("mvnet_loopback-virtio")
    done = service.mdevkit("pktgen", UUID[:6], "--count", "100", "--rate", "1k")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["sent", "received", "lost", "latency"]
    assert "received  100 frames, " in done.stdout
    assert "lost      0 (0.000%)" in done.stdout
    assert done.stderr == "", "no progress line where there is no terminal"


def test_of_frames_that_never_return_there_is_no_latency(service, run):
    run("mvnet_loopback-virtio", "--set", "link=down")
    done = service.mdevkit("pktgen", UUID, "--count", "10", "--timeout", "0.1")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == ["lost      10 (100.000%)", "latency   no frame has returned"]
    result = json.loads(service.mdevkit("pktgen", UUID, "--count", "10", "--timeout", "0.1", "--json").stdout)
    assert result["latency_us"] == dict.fromkeys(["min", "p50", "p90", "p99", "p99.9", "max"])


def test_frames_that_return_too_late_have_no_latency_either(capsys):
    _print(Result(sent=3, lost=3, late=2))
    assert capsys.readouterr().out.splitlines()[-2:] == ["also      2 late", "latency   no frame has returned in time"]


def test_a_progress_line_on_a_terminal(service, run):
    run("mvnet_loopback-virtio")
    leader, follower = pty.openpty()
    command = [MDEVKIT, "pktgen", UUID, "--count", "0", "--time", "1.2", "--rate", "100"]
    subprocess.run(command, stderr=follower, stdout=subprocess.PIPE, env=service.environment, timeout=60, check=True)
    os.close(follower)
    text = os.read(leader, 65536).decode()
    os.close(leader)
    assert text.count("\r") >= 2
    assert " received  0 lost  " in text


def test_ctrl_c_ends_it_with_the_figures(service, run):
    run("mvnet_loopback-virtio")
    leader, follower = pty.openpty()
    command = [MDEVKIT, "pktgen", UUID, "--count", "0", "--rate", "1k"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, text=True, env=service.environment)
    os.close(follower)
    text = ""
    while " sent " not in text:
        text += os.read(leader, 4096).decode()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    os.close(leader)
    assert process.returncode == 0
    assert "lost      0 (0.000%)" in output


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--size", "59"], 1, "frames of 59 bytes cannot be sent: 60 to 1514 are possible here [EINVAL]"),
        (["--size", "60,1515"], 1, "frames of 1515 bytes cannot be sent"),
        (["--size", "big"], 2, "'big' is no list of sizes: bytes are wanted, e.g. 60 or 60,1514"),
        (["--rate", "fast"], 2, "'fast' is no rate: frames per second are wanted, e.g. 500, 20k or 1.5M"),
        (["--count", "-1"], 2, "-1 is not in the range x>=0"),
        (["--time", "inf"], 2, "times must be finite"),
        (["--window", "0"], 2, "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_be_sent(service, run, words, code, text):
    run("mvnet_loopback-virtio")
    done = service.mdevkit("pktgen", UUID, *words)
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("type_id", ["mvnet_loopback-virtio", "mvnet_loopback-vhost"])
def test_a_device_in_use(service, run, type_id):
    facts = run(type_id)
    long = [MDEVKIT, "pktgen", UUID, "--count", "0", "--rate", "100", "--json"]
    with subprocess.Popen(long, stdout=subprocess.PIPE, text=True, env=service.environment) as other:
        wait_until(lambda: f"pid {other.pid} (" in json.loads(service.mdevkit("show", UUID, "--json").stdout)["client"])
        done = service.mdevkit("pktgen", UUID, "--count", "1")
        assert done.returncode == 1
        assert f"device {UUID} is in use by pid {other.pid} (" in done.stderr
        other.send_signal(signal.SIGINT)
        result = json.loads(other.communicate(timeout=60)[0])
    assert result["lost"] == 0
    assert facts["uuid"] == UUID


def test_devices_that_are_none_or_no_network(service, run):
    done = service.mdevkit("pktgen", UUID)
    assert (done.returncode, "there is no running device" in done.stderr) == (1, True), done.stderr
    run("mtty-1")
    done = service.mdevkit("pktgen", UUID)
    assert done.returncode == 1
    assert f"device {UUID} is no virtio network device but mtty-1 (vfio-user) [EOPNOTSUPP]" in done.stderr


def test_a_tap_needs_a_netdev(service, run):
    run("mvnet_loopback-vhost")
    done = service.mdevkit("tap", UUID)
    assert done.returncode == 1
    wanted = f"is bound to vhost_mdev, this needs virtio_mdev: mdevkit unbind {UUID} && mdevkit bind {UUID} virtio_mdev --override"
    assert wanted in done.stderr


def test_a_device_of_the_service_moves_between_the_drivers(service):
    service.start()
    done = service.mdevkit("create", "mvnet_loopback-virtio", "--uuid", UUID)
    assert done.returncode == 0, done.stderr
    for turn, driver in enumerate(["virtio_mdev", "vhost_mdev", "virtio_mdev", "vhost_mdev"]):
        if turn:
            assert service.mdevkit("unbind", UUID).returncode == 0
            done = service.mdevkit("pktgen", UUID)
            assert f"device {UUID} is bound to no driver; try: mdevkit bind {UUID} [ENODEV]" in done.stderr
            done = service.mdevkit("bind", UUID, driver, "--override")
            assert done.returncode == 0, done.stderr
        assert json.loads(service.mdevkit("show", UUID, "--json").stdout)["driver"] == driver
        result = generate(service, "--count", "500", "--size", "60,1500")
        assert (result["received"], result["lost"]) == (500, 0)
        words = service.mdevkit("attach", UUID, "--qemu").stdout
        assert ("stream,id=net-" if driver == "virtio_mdev" else "vhost-user,id=") in words
    assert service.mdevkit("remove", UUID).returncode == 0


def test_who_uses_a_device_of_the_service_is_named(service):
    service.start()
    assert service.mdevkit("create", "mvnet_loopback-virtio", "--uuid", UUID).returncode == 0
    facts = json.loads(service.mdevkit("attach", UUID, "--json").stdout)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(facts["socket"])
        wait_until(lambda: json.loads(service.mdevkit("attach", UUID, "--json").stdout)["client"])
        done = service.mdevkit("pktgen", UUID)
        assert f"device {UUID} is in use by pid {os.getpid()} (" in done.stderr
        done = service.mdevkit("remove", UUID)
        assert done.returncode == 1
        assert f"is in use by pid {os.getpid()} (" in done.stderr
    wait_until(lambda: not json.loads(service.mdevkit("attach", UUID, "--json").stdout)["client"])
