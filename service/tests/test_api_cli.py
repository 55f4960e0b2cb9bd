"""Commands against a service, as a user meets them: real processes, output, exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.services import alive, wait_until

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "83c4c5a1-2bd4-4f83-8c9e-0a55d0d1b0aa"


@pytest.fixture
def mdevkit(service):
    """Runs a command; the service it starts is stopped at the end."""
    yield service.mdevkit
    done = service.mdevkit("service", "stop", "--remove", "--force")
    assert done.returncode == 0, done.stderr


def fails(done, code, *words):
    assert done.returncode == code, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_create_starts_everything_and_prints_the_uuid_alone(mdevkit):
    done = mdevkit("create", "demo-small", "--uuid", UUID.upper())
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{UUID}\n", "")
    made_up = mdevkit("create", "demo-many").stdout
    assert len(made_up) == 37
    assert sorted(mdevkit("list").stdout.splitlines()) == sorted(
        [f"{UUID} demo0 demo-small manual", f"{made_up.strip()} demo0 demo-many manual"]
    )


def test_create_with_everything(mdevkit, tmp_path):
    path = str(tmp_path / "a.sock")
    words = ["--parent", "twin1", "--set", "speed=7", "--set", "note=a=b", "--socket", path, "--owner", "me", "--json"]
    device = json.loads(mdevkit("create", "demo-big", "-u", UUID, *words).stdout)
    assert (device["parent"], device["endpoint"]["socket"], device["owner"]) == ("twin1", path, "me")
    shown = mdevkit("show", UUID[:3]).stdout
    for line in ("state           bound", "owner           me", "attribute       speed = 7", "attribute       note = a=b"):
        assert line in shown.splitlines()
    assert json.loads(mdevkit("show", UUID, "--json").stdout)["attributes"]["note"] == "a=b"
    assert mdevkit("attach", UUID[:8]).stdout == f"-demo {path}\n"
    assert json.loads(mdevkit("attach", UUID[:8], "--json").stdout)["socket"] == path
    fails(mdevkit("attach", UUID, "--dpdk"), 1, "dpdk cannot use device", "EOPNOTSUPP")


def test_dry_run(mdevkit):
    assert mdevkit("create", "demo-big", "--dry-run").stdout == "demo-big can be created on demo0\n"
    assert mdevkit("list").stdout == ""


def test_list_in_all_its_shapes(mdevkit):
    mdevkit("create", "demo-small", "-u", UUID, "-p", "twin0")
    mdevkit("create", "demo-many", "-u", OTHER, "-p", "demo1", "--no-bind")
    assert mdevkit("list").stdout == f"{OTHER} demo1 demo-many manual\n{UUID} twin0 demo-small manual\n"
    assert mdevkit("list", "--parent=twin0").stdout == f"{UUID} twin0 demo-small manual\n"
    assert mdevkit("list", "-u", OTHER).stdout == f"{OTHER} demo1 demo-many manual\n"
    assert json.loads(mdevkit("list", "--dumpjson", "-u", UUID).stdout) == [
        {"twin0": [{UUID: {"mdev_type": "demo-small", "start": "manual", "attrs": []}}]}
    ]
    assert [device["state"] for device in json.loads(mdevkit("list", "--json").stdout)] == ["unbound", "bound"]
    tree = mdevkit("list", "--tree").stdout.splitlines()
    where = tree.index("twin0")
    assert tree[where + 1 : where + 4] == ["  demo-small (7 available)", f"    {UUID} bound demo_drv", "  demo-big (1 available)"]
    assert "  Driver: demo_drv" in mdevkit("list", "-v").stdout.splitlines()


def test_types_ask_the_service(mdevkit):
    mdevkit("create", "demo-big", "-p", "demo1")
    lines = mdevkit("types", "-p", "demo1").stdout.splitlines()
    assert lines[:5] == [
        "demo1",
        "  demo-small",
        "    Available instances: 4",
        "    Device API: demo",
        "    Name: Small demo device",
    ]
    assert "    Description: Small demo device, for tests" in lines
    (parent,) = json.loads(mdevkit("types", "--parent", "demo1", "--json").stdout)
    assert parent["demo1"][1]["demo-big"]["available_instances"] == 1
    fails(mdevkit("types", "-p", "nobody"), 1, "there is no parent 'nobody'")


def test_bind_and_unbind(mdevkit):
    mdevkit("create", "demo-small", "-u", UUID)
    assert mdevkit("unbind", UUID[:4]).returncode == 0
    fails(mdevkit("unbind", UUID), 1, "is bound to no driver", "ENODEV")
    assert mdevkit("bind", UUID, "demo_drv").returncode == 0
    assert mdevkit("show", UUID).stdout.splitlines()[6] == "driver          demo_drv"
    fails(mdevkit("bind", UUID), 1, "EBUSY")
    fails(mdevkit("bind", UUID, "--override"), 2, "--override needs a DRIVER")


def test_remove_goes_on_after_an_error(mdevkit):
    for uuid in (UUID, OTHER):
        mdevkit("create", "demo-small", "-u", uuid)
    done = mdevkit("remove", "83c", UUID, "83c4")
    assert done.returncode == 1
    assert done.stderr == "'83c' is the beginning of 2 devices' UUIDs [EINVAL]\n"
    assert mdevkit("list").stdout == ""


def test_events(mdevkit, service):
    mdevkit("create", "demo-small", "-u", UUID)
    lines = mdevkit("events", "--after", "0", "--timeout", "0.2").stdout.splitlines()
    variables = "MODALIAS=demo:c01 MDEV_TYPE=demo-small MDEV_PARENT=demo0 DRIVER=demo_drv"
    assert lines[-1].split(" ", 4)[2:] == ["bind", UUID, variables]
    last = json.loads(mdevkit("events", "--after", "0", "--timeout", "0.2", "--json").stdout.splitlines()[-1])
    assert (last["action"], last["seq"]) == ("bind", len(lines))


def test_top(mdevkit):
    mdevkit("create", "demo-small", "-u", UUID)
    output = mdevkit("top", "-d", "0.1", "-n", "1").stdout
    assert "HOST   PID" in output
    assert f"{UUID}  demo-small  bound  demo_drv  -\n" in output
    assert "COUNTER" not in output, "nothing has moved"
    look = json.loads(mdevkit("top", "--json").stdout)
    assert {host["key"] for host in look["hosts"]} == {"demo0", "demo1", "twins"}
    assert look["counters"] == {UUID: {"count": [0], "counts": [0, 0]}}


def test_top_shows_how_fast_counters_grow(service):
    service.start()
    with service.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
        command = [Path(sys.executable).with_name("mdevkit"), "top", "-d", "0.5", "-n", "1"]
        with subprocess.Popen(command, env=service.environment, stdout=subprocess.PIPE, text=True) as top:
            while top.poll() is None:
                client.put(f"/v1/devices/{UUID}/attributes/assign", {"value": "1"})
            lines = [line.split() for line in top.stdout.read().splitlines()[-3:]]
    assert lines[0] == ["DEVICE", "COUNTER", "RATE", "TOTAL", "EACH", "QUEUE"]
    for line, name, each in zip(lines[1:], ("count", "counts"), ([], [lines[2][2].removesuffix("/s"), "0"]), strict=True):
        assert line[:2] == [UUID, name]
        assert int(line[2].removesuffix("/s")) > 0
        assert line[4:] == each
        assert int(line[3]) > 0


def in_terminal(service, *words, **changes):
    """What a command writes to a terminal."""
    ours, its = pty.openpty()
    command = [Path(sys.executable).with_name("mdevkit"), *words]
    environment = {**service.environment, "TERM": "xterm", **changes}
    with subprocess.Popen(command, env=environment, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        written = b""
        with suppress(OSError):  # EIO: nobody has the other end open any more
            while data := os.read(ours, 4096):
                written += data
    os.close(ours)
    assert process.returncode == 0, written
    return written.decode().replace("\r\n", "\n")


def test_a_terminal_shows_states_in_colours_and_a_pipe_does_not(service):
    service.start()
    with service.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "parent": "demo0", "uuid": UUID, "owner": "me", "bind": False})
        client.post(f"/v1/devices/{UUID}/bind", {})
    shown = in_terminal(service, "show", UUID)
    assert "\x1b[2mstate           \x1b[0m\x1b[32mbound\x1b[0m\n" in shown
    assert re.sub(r"\x1b\[\d*m", "", shown) == service.mdevkit("show", UUID).stdout
    tree = in_terminal(service, "list", "--tree")
    assert f"    {UUID} \x1b[32mbound\x1b[0m demo_drv\x1b[2m owner=me\x1b[0m\n" in tree
    assert tree.startswith("\x1b[1mdemo0\x1b[0m\n")
    plain = service.mdevkit("list", "--tree").stdout
    assert re.sub(r"\x1b\[\d*m", "", tree) == plain
    assert f"    {UUID} bound demo_drv owner=me\n" in plain
    for changes in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert in_terminal(service, "list", "--tree", **changes) == plain
    assert "\x1b[1mHOST\x1b[0m " in in_terminal(service, "top", "-n", "1", "-d", "0.1")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["create", "demo-huge"], 1, "there is no type 'demo-huge'"),
        (["create", "demo-small", "--set", "speed=fast"], 1, "a whole number is wanted, not 'fast' [EINVAL]"),
        (["create", "demo-small", "--set", "speed"], 2, "'speed' is not of the form NAME=VALUE"),
        (["create", "demo-small", "--uuid", "x"], 2, "'x' is not a UUID"),
        (["show", "0000"], 1, "there is no device '0000' [ENODEV]"),
        (["remove", "0000"], 1, "there is no device '0000' [ENODEV]"),
        (["list", "--bogus"], 2, "--bogus"),
        (["list", "--tree", "--json"], 2, "exclude one another"),
        (["show"], 2, "UUID"),
    ],
)
def test_mistakes_are_told_in_one_line(mdevkit, words, code, said):
    fails(mdevkit(*words), code, said)


# -- the service -----------------------------------------------------------------------------------------------------------


def test_start_status_stop(service):
    fails(service.mdevkit("service", "status"), 1, f"no service runs at {service.socket} [ECONNREFUSED]")
    assert service.mdevkit("service", "stop").stdout == f"no service runs at {service.socket}\n"
    for _ in range(2):
        assert service.mdevkit("service", "start").stdout == f"the service runs at {service.socket}\n"
    facts = json.loads(service.mdevkit("service", "status", "--json").stdout)
    assert (facts["socket"], facts["devices"], len(facts["hosts"])) == (str(service.socket), 0, 3)
    assert f"pid         {facts['pid']}" in service.mdevkit("service", "status").stdout.splitlines()
    assert service.mdevkit("service", "stop").returncode == 0
    assert not alive(facts["pid"])
    assert service.files() == []


def test_a_service_that_a_command_starts_again_has_the_options_of_the_last(service, tmp_path):
    def definitions():
        with service.client() as client:
            return client.get("/v1/version")["definitions"]

    assert service.mdevkit("service", "start", "--definitions", tmp_path / "mine").returncode == 0
    assert service.mdevkit("service", "start", "--definitions", tmp_path / "mine").returncode == 0, "it does already"
    fails(
        service.mdevkit("service", "start", "--definitions", tmp_path / "other"),
        1,
        f"the service runs at {service.socket} already, with its own options: mdevkit service stop, then start",
    )
    os.kill(service.pid(), signal.SIGKILL)
    assert service.mdevkit("list", "-d").returncode == 0
    assert definitions() == str(tmp_path / "mine")
    service.mdevkit("service", "stop")
    assert service.mdevkit("list", "-d").returncode == 0
    assert definitions() == str(tmp_path / "mine")
    # On purpose it is another.
    service.mdevkit("service", "stop")
    assert service.mdevkit("service", "start").returncode == 0
    assert definitions() == str(service.definitions)
    service.mdevkit("service", "stop")
    (service.runtime / "options.json").write_text("{")
    failed = service.mdevkit("list", "-d")
    fails(failed, 1, "the options of the last service, cannot be read", "mdevkit service start makes it anew")
    assert service.mdevkit("service", "start", "--definitions", tmp_path / "mine").returncode == 0
    service.mdevkit("service", "stop")
    # What cannot work is not remembered.
    wrong = service.mdevkit("service", "start", "--group", "nosuchgroup")
    assert wrong.returncode == 1, wrong
    assert service.mdevkit("list", "-d").returncode == 0
    assert definitions() == str(tmp_path / "mine")


def test_devices_are_listed_where_definitions_cannot_be(service, mdevkit, tmp_path):
    (tmp_path / "definitions").write_text("no folder")
    mdevkit("create", "demo-small", "-u", UUID)
    done = mdevkit("list")
    assert (done.returncode, done.stdout) == (0, f"{UUID} demo0 demo-small manual\n")
    assert (
        done.stderr
        == f"the definitions in {service.definitions} cannot be listed: {service.definitions}: Not a directory [ENOTDIR]\n"
    )
    fails(mdevkit("list", "-d"), 1, "cannot be listed")


def test_stop_leaves_devices_and_says_so(service):
    service.mdevkit("create", "demo-small", "-u", UUID)
    done = service.mdevkit("service", "stop")
    assert (done.returncode, done.stderr) == (0, "devices that go on: 1 (mdevkit service stop --remove ends them too)\n")
    assert service.mdevkit("list").stdout == f"{UUID} demo0 demo-small manual\n"
    assert service.mdevkit("service", "stop", "--remove").stderr == ""
    assert service.files() == []


def test_stop_with_remove_goes_on_when_a_device_is_in_use(service):
    service.mdevkit("create", "demo-small", "-u", UUID)
    with service.client() as client:
        client.put(f"/v1/devices/{UUID}/attributes/client", {"value": "pid 4711"})
    fails(service.mdevkit("service", "stop", "--remove"), 1, "is in use by pid 4711", "EBUSY")
    assert service.mdevkit("list").stdout.startswith(UUID)
    assert service.mdevkit("service", "stop", "--remove", "--force").returncode == 0


# -- speed -----------------------------------------------------------------------------------------------------------------

HEAVY = {"typer", "click", "rich", "stevedore", "pluggy", "asyncio", "subprocess", "tempfile", "importlib.metadata"}


@pytest.mark.parametrize("words", [["list"], ["types"], ["show", UUID], ["list", "--tree"], ["list", "--json"]])
def test_quick_commands_import_nothing_heavy(service, words):
    service.start()
    with service.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
    program = (
        "import sys\nfrom mdevkit.__main__ import main\n"
        f"sys.argv = ['mdevkit', *{words!r}]\ncode = main()\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=service.environment, capture_output=True, text=True, check=True)
    assert done.stdout
    assert not HEAVY & set(done.stderr.split())


def test_list_takes_at_most_four_times_as_long_as_python_itself(service):
    service.start()
    environment = {name: value for name, value in service.environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    commands = {"pass": [sys.executable, "-c", "pass"], "list": [Path(sys.executable).with_name("mdevkit"), "list"]}
    best = dict.fromkeys(commands, float("inf"))

    def ratio():
        for _ in range(10):
            for name, command in commands.items():
                began = time.perf_counter()
                pid = os.posix_spawn(command[0], [str(word) for word in command], environment)
                os.waitpid(pid, 0)
                best[name] = min(best[name], time.perf_counter() - began)
        return best["list"] / best["pass"]

    # The least of many: another process on this machine can only make it slower.
    wait_until(lambda: ratio() <= 4, seconds=20, what=f"4 times as long ({best})")
