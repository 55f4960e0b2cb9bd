"""The command line as a user meets it: a real process each time, its output, its exit code and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid as uuids
from pathlib import Path

import pytest

from tests.services import HEEDS_SIGNALS

MDEVKIT = Path(sys.executable).with_name("mdevkit")
UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a001"


@pytest.fixture
def runtime():
    """A private runtime folder, so that nothing else is found and nothing is left unnoticed. Short: sockets live in it."""
    with tempfile.TemporaryDirectory(prefix="mdk") as folder:
        yield Path(folder)


@pytest.fixture
def environment(runtime):
    return {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "NO_COLOR": "1"}


@pytest.fixture
def mdevkit(environment):
    """Runs a command to its end."""

    def run(*words, **changes):
        return subprocess.run(
            [MDEVKIT, *words], capture_output=True, text=True, timeout=60, env={**environment, **changes}, check=False
        )

    return run


@pytest.fixture
def serving(environment):
    """Starts `mdevkit run` and returns (process, facts); every process is ended at the end."""
    started = []

    def start(*words):
        command = [*HEEDS_SIGNALS, MDEVKIT, "run", *words, "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                return process, json.loads("".join(lines))
        raise AssertionError(process.stderr.read())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def left_behind(runtime):
    return sorted(str(path.relative_to(runtime)) for path in runtime.rglob("*") if not path.is_dir())


def until(true):
    """Wait for what only a command can tell."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline


def fails(result, code, *words):
    """Check that a command failed as it should: the code, one line on stderr, and what it says."""
    assert result.returncode == code, result
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


# -- listings ----------------------------------------------------------------------------------------------------------


def test_version_is_the_distributions(mdevkit):
    from importlib.metadata import version

    assert mdevkit("--version").stdout == f"mdevkit {version('mdevkit')}\n"


def test_types_are_printed_as_mdevctl_prints_them(mdevkit):
    lines = mdevkit("types", "-p", "mtty").stdout.splitlines()
    assert lines[0] == "mtty"
    start = lines.index("  mtty-2")
    assert lines[start + 1 : start + 4] == [
        "    Available instances: 12",
        "    Device API: vfio-pci",
        "    Name: Dual port serial",
    ]


def test_types_as_json_have_mdevctls_shape(mdevkit):
    (parent,) = json.loads(mdevkit("types", "--parent", "mtty", "--json").stdout)
    assert parent["mtty"][0] == {"mtty-1": {"available_instances": 24, "device_api": "vfio-pci", "name": "Single port serial"}}


@pytest.mark.parametrize("command", ["plugins", "buses", "drivers", "parents"])
def test_every_listing_has_json_that_tells_what_the_text_tells(mdevkit, command):
    facts = json.loads(mdevkit(command, "--json").stdout)
    text = mdevkit(command).stdout
    assert facts
    assert all(fact["name"] in text for fact in facts)


def test_plugins_without_check_imports_nothing(mdevkit):
    facts = json.loads(mdevkit("plugins", "--no-check", "--json").stdout)
    assert {fact["status"] for fact in facts} == {"installed"}


def test_plugins_are_all_usable(mdevkit):
    facts = json.loads(mdevkit("plugins", "--json").stdout)
    assert {fact["name"]: fact["reason"] for fact in facts if fact["status"] != "loaded"} == {}


def test_without_any_plugin_types_says_what_to_install(mdevkit):
    result = mdevkit("types", MDEVKIT_PLUGINS="")
    assert result.returncode == 0
    assert "pip install mdevkit-mtty" in result.stderr


def test_a_listing_into_a_closed_pipe_ends_quietly(environment):
    script = f"{shlex.quote(str(MDEVKIT))} plugins --no-check | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert result.stderr == ""


# -- run and attach ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_serves_until_a_signal_and_leaves_nothing(serving, runtime, number):
    process, facts = serving("mtty-2")
    assert Path(facts["socket"]).is_socket()
    assert left_behind(runtime)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    assert left_behind(runtime) == []


def test_run_outlives_the_terminal_where_nohup_wants_it(environment, runtime):
    command = ["nohup", MDEVKIT, "run", "mtty-2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.stdout.readline() != "}\n":
            pass
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert left_behind(runtime)
        process.terminate()
    assert left_behind(runtime) == []


def test_run_prints_uuid_socket_and_qemu_arguments(environment, runtime):
    process = subprocess.Popen([MDEVKIT, "run", "mtty-1", "--uuid", UUID], stdout=subprocess.PIPE, text=True, env=environment)
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert lines[0] == f"device  {UUID} (mtty-1 of mtty)\n"
    assert lines[1] == f"socket  {runtime}/mdevkit/{UUID}.sock\n"
    option, value = shlex.split(lines[2].removeprefix("qemu"))
    assert option == "-device"
    assert json.loads(value) == {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": f"{runtime}/mdevkit/{UUID}.sock"},
    }


def test_attach_finds_a_device_by_the_beginning_of_its_uuid(serving, mdevkit):
    _, facts = serving("mtty-2", "--uuid", UUID)
    printed = shlex.split(mdevkit("attach", UUID[:6]).stdout)
    assert printed == facts["attach"]["qemu"]
    assert json.loads(mdevkit("attach", UUID, "--json").stdout)["socket"] == facts["socket"]
    assert "<qemu:arg value=" in mdevkit("attach", UUID, "--libvirt").stdout


def test_attach_says_what_cannot_be_used_or_found(serving, mdevkit):
    fails(mdevkit("attach", UUID), 1, f"there is no running device '{UUID}'", "ENODEV")
    serving("mtty-2", "--uuid", UUID)
    serving("mtty-2", "--uuid", UUID[:-1] + "2")
    fails(mdevkit("attach", UUID[:4]), 1, "is the beginning of 2 devices' UUIDs", "EINVAL")
    fails(mdevkit("attach", UUID, "--dpdk"), 1, "dpdk cannot use device", "EOPNOTSUPP")
    fails(mdevkit("attach", UUID, "--dpdk", "--qemu"), 2, "exclude one another")


def test_a_device_killed_outright_is_not_found_and_its_name_is_free_again(serving, mdevkit, runtime):
    process, facts = serving("mtty-2", "--uuid", UUID)
    process.kill()
    process.wait()
    assert Path(facts["socket"]).is_socket(), "SIGKILL cannot be cleaned up after"
    fails(mdevkit("attach", UUID), 1, "there is no running device")
    assert left_behind(runtime) == [f"mdevkit/{UUID}.sock"]
    again, _ = serving("mtty-2", "--uuid", UUID)
    again.terminate()
    assert again.wait(20) == 0
    assert left_behind(runtime) == []


def shown(mdevkit):
    return json.loads(mdevkit("show", UUID, "--json").stdout)


def test_show_tells_how_a_device_is_now(serving, mdevkit):
    _, facts = serving("mvnet_loopback-virtio", "--uuid", UUID)
    assert shown(mdevkit) == facts
    assert mdevkit("pktgen", UUID, "--count", "300").returncode == 0
    now = shown(mdevkit)
    assert (facts["attributes"]["tx_packets"], now["attributes"]["tx_packets"]) == ("0", "300")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(facts["socket"])
        until(lambda: f"pid {os.getpid()}" in shown(mdevkit)["client"])
    until(lambda: not shown(mdevkit)["client"])


def test_a_device_whose_process_stands_still_is_shown_as_it_began(serving, mdevkit):
    process, facts = serving("mtty-2", "--uuid", UUID)
    process.send_signal(signal.SIGSTOP)
    try:
        device = shown(mdevkit)
        assert mdevkit("list").stdout.startswith(UUID)
    finally:
        process.send_signal(signal.SIGCONT)
    assert device.pop("error") == f"its process (pid {process.pid}) does not answer; this is how it began"
    assert device == facts
    assert shown(mdevkit) == facts


def test_attributes_are_set_at_creation(serving):
    _, facts = serving("mtty-1", "--set", "port0=pty")
    assert facts["state"] == "bound"


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_wrong_uuid_text(mdevkit):
    fails(mdevkit("run", "mtty-2", "--uuid", "not-a-uuid"), 2, "'not-a-uuid' is not a UUID")


def test_unknown_type_names_those_there_are(mdevkit):
    fails(mdevkit("run", "mtty-3"), 1, "there is no type 'mtty-3'", "mtty-1, mtty-2", "ENODEV")


def test_unknown_parent_names_those_there_are(mdevkit):
    fails(mdevkit("run", "mtty-2", "--parent", "nobody"), 1, "there is no parent 'nobody'", "mtty", "ENODEV")
    fails(mdevkit("types", "--parent", "nobody"), 1, "there is no parent 'nobody'", "ENODEV")


def test_unknown_attribute_names_those_there_are(mdevkit):
    fails(mdevkit("run", "mtty-2", "--set", "speed=9"), 1, "has no attribute 'speed'", "port0", "port1", "ENOENT")


def test_attribute_out_of_range_says_what_is_wanted(mdevkit, runtime):
    fails(mdevkit("run", "mtty-2", "--set", "compat=windows"), 1, "attribute compat", "'windows'", "EINVAL")
    fails(mdevkit("run", "mtty-2", "--set", "port0=telnet"), 1, "attribute port0", "'telnet'", "EINVAL")
    assert left_behind(runtime) == []


def test_setting_without_a_value_or_twice(mdevkit):
    fails(mdevkit("run", "mtty-2", "--set", "port0"), 2, "'port0' is not of the form NAME=VALUE")
    fails(mdevkit("run", "mtty-2", "--set", "port0=pty", "--set", "port0=pty"), 2, "port0 is given twice")


def test_socket_path_that_is_taken(serving, mdevkit, tmp_path):
    path = tmp_path / "taken.sock"
    serving("mtty-2", "--socket", str(path))
    fails(mdevkit("run", "mtty-2", "--socket", str(path)), 1, str(path), "EADDRINUSE")
    assert path.is_socket(), "the device that has it goes on"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_socket_path_that_is_a_file_keeps_the_file(mdevkit, tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    fails(mdevkit("run", "mtty-2", "--socket", str(path)), 1, str(path), "EADDRINUSE")
    assert path.read_text() == "data"


def test_socket_path_too_long(mdevkit, tmp_path):
    path = tmp_path / ("x" * 120)
    fails(mdevkit("run", "mtty-2", "--socket", str(path)), 1, "107", "ENAMETOOLONG")


def test_socket_in_a_missing_folder(mdevkit, tmp_path):
    path = tmp_path / "missing" / "x.sock"
    fails(mdevkit("run", "mtty-2", "--socket", str(path)), 1, str(path.parent), "ENOENT")


def test_runtime_folder_that_is_somebody_elses(mdevkit, runtime):
    (runtime / "mdevkit").mkdir(mode=0o777)
    (runtime / "mdevkit").chmod(0o777)
    fails(mdevkit("run", "mtty-2"), 1, "nobody else can write", "EPERM")


def test_no_driver_installed_names_alias_and_package(mdevkit, tmp_path):
    """A distribution with a bus and a parent, but no driver for them, next to the blocked ones of ours."""
    (tmp_path / "lonely.py").write_text(
        "from mdevkit import Bus, MdevType, ParentOps, hookimpl\n"
        "class LonelyBus(Bus):\n"
        "    name = 'mdev'\n"
        "class Lonely(ParentOps):\n"
        "    name = 'lonely'\n"
        "    def __init__(self): self.types = [MdevType('1', bus='mdev', device_api='vfio-pci')]\n"
        "    @hookimpl\n"
        "    def parent_create(self, mdev, params): mdev._set_class(1, object())\n"
        "    @hookimpl\n"
        "    def parent_remove(self, mdev): pass\n"
    )
    info = tmp_path / "lonely-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lonely\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mdevkit.parents]\nlonely = lonely:Lonely\n[mdevkit.buses]\nmdev = lonely:LonelyBus\n")
    result = mdevkit("run", "lonely-1", PYTHONPATH=str(tmp_path), MDEVKIT_PLUGINS="lonely")
    fails(result, 1, "no driver for mdev:c01 is installed", "pip install mdevkit-vfio", "ENODEV")


def test_missing_class_bus_names_the_package(mdevkit):
    fails(
        mdevkit("run", "mtty-2", MDEVKIT_PLUGINS="mdevkit-mtty"), 1, "class bus mdev is not installed", "pip install mdevkit-vfio"
    )


def test_second_client_is_refused_and_told(serving):
    """A second client gets an answer at once while the first goes on."""
    from mdevkit import MdevError
    from mdevkit_vfio.client import VfioUserClient

    _, facts = serving("mtty-1")
    with VfioUserClient.connect(facts["socket"]) as first:
        with pytest.raises(MdevError, match=r"in use|busy|EBUSY"):
            VfioUserClient.connect(facts["socket"])
        assert first.config.read(0, 2) == b"\x48\x43"


def test_unknown_command_and_option_are_usage_errors(mdevkit):
    fails(mdevkit("frobnicate"), 2, "frobnicate")
    fails(mdevkit("types", "--frob"), 2, "--frob", "mdevkit types --help")
    fails(mdevkit("run"), 2, "Missing argument 'TYPE'")


def test_control_characters_do_not_reach_the_terminal(mdevkit):
    result = mdevkit("run", "evil\x1b[2Jtype")
    assert "\x1b" not in result.stderr
    assert re.search(r"\\+x1b\[2J", result.stderr)


def test_what_a_broken_plugin_says_is_escaped_too(mdevkit, tmp_path):
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mdevkit.parents]\nevil = evil:Evil\n")
    (tmp_path / "evil.py").write_text(r"raise RuntimeError('\x1b[2Jgone')")
    result = mdevkit("types", PYTHONPATH=str(tmp_path))
    assert "\x1b" not in result.stderr
    assert "plugin evil of evil 1.0 cannot be used: RuntimeError: " in result.stderr
    assert "mtty-2" in result.stdout, "the others work"


def test_uuid_is_made_up_when_none_is_given(serving):
    _, facts = serving("mtty-1")
    assert uuids.UUID(facts["uuid"]).version == 4
