"""mdevctl itself, unmodified, on the mounted tree: what only the tree can show. The cases of its own suite are in
test_mdevctl_blackbox.py.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest

from tests.mdevctl import REAL, open_world

A, B, C = (f"5e5f5000-1c1b-4a58-9c67-6a6d6ff1a00{digit}" for digit in "abc")


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory):
    with open_world(REAL, tmp_path_factory.mktemp("w")) as world:
        yield world


@pytest.fixture
def world(shared_world):
    shared_world.clean()
    return shared_world


def listed(world, *words):
    """Return parents to devices to what JSON says of them."""
    (parents,) = json.loads(world.ok("list", "--dumpjson", *words)) or ({},)
    return {parent: {uuid: facts for device in devices for uuid, facts in device.items()} for parent, devices in parents.items()}


def test_types_and_their_pool_are_those_of_the_service(world):
    (parents,) = json.loads(world.ok("types", "--dumpjson"))
    assert list(parents) == ["demo0", "demo1", "twin0", "twin1"]
    room = {name: facts["available_instances"] for type_ in parents["demo0"] for name, facts in type_.items()}
    assert room == {"demo-big": 2, "demo-many": 2**31 - 1, "demo-small": 8}
    world.ok("start", "-u", A, "-p", "demo0", "-t", "demo-big")
    text = world.ok("types", "-p", "demo0")
    assert "  demo-big\n    Available instances: 1\n    Device API: demo\n    Name: Big demo device\n" in text
    assert "  demo-small\n    Available instances: 4\n" in text
    assert "    Description: Small demo device, for tests\n" in text


def test_a_device_lives(world):
    uuid = world.ok("start", "-p", "demo1", "-t", "demo-small").strip()
    assert world.devices() == {(uuid, "demo1", "demo-small")}
    assert world.ok("list") == f"{uuid} demo1 demo-small manual\n"
    world.ok("define", "-u", uuid, "--auto")
    world.ok("modify", "-u", uuid, "--addattr", "speed", "--value", "33")
    assert listed(world, "-d")["demo1"][uuid] == {"mdev_type": "demo-small", "start": "auto", "attrs": [{"speed": "33"}]}
    assert world.attribute(uuid, "speed") == "10", "a definition changes no running device"
    world.ok("stop", "-u", uuid)
    assert world.devices() == set()
    world.ok("start", "-u", uuid)
    assert world.attribute(uuid, "speed") == "33"
    assert world.ok("list", "-d") == f"{uuid} demo1 demo-small auto (active)\n"
    world.ok("undefine", "-u", uuid)
    assert listed(world) == {"demo1": {uuid: {"mdev_type": "demo-small", "start": "manual", "attrs": []}}}


def test_a_refused_attribute_takes_the_device_back(world, tmp_path):
    for attrs, reason in (
        ([{"speed": "20"}, {"speed": "2000"}], "Invalid argument (os error 22)"),
        ([{"moody": "3"}], "Numerical result out of range (os error 34)"),
        ([{"serial": "1"}], "Permission denied (os error 13)"),
    ):
        world.define(A, "demo0", "demo-small", attrs=attrs)
        said = world.fails("start", "-u", A, saying=reason)
        assert f"attribute {next(iter(attrs[-1]))}" in said
        assert world.devices() == set()
    world.define(A, "demo0", "demo-small", attrs=[{"nothing": "1"}])
    world.fails("start", "-u", A, saying="Invalid attribute 'nothing'")
    assert world.devices() == set()


def test_the_errno_of_the_service_is_what_mdevctl_tells(world):
    label = world.root / "sys/class/mdev_bus/twin0/crash_on_create"
    label.write_text("1")
    said = world.fails(
        "start", "-u", A, "-p", "twin0", "-t", "demo-small", saying=f"Failed to create mdev {A}, type demo-small on twin0"
    )
    assert "Input/output error (os error 5)" in said
    world.device(B, "demo0", "demo-small")
    world.client.put(f"/v1/devices/{B}/attributes/client", {"value": "pid 1"})
    assert "Device or resource busy (os error 16)" in world.fails("stop", "-u", B, saying="Error removing device")
    assert (B, "demo0", "demo-small") in world.devices()


def test_the_last_instance_has_one_winner(world):
    """mdevctl looks first and creates then: whoever slips through is refused by the framework."""
    world.device(A, "demo0", "demo-big")
    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(lambda _: world.run("start", "-p", "demo0", "-t", "demo-big"), range(10)))
    assert [result.code for result in results].count(0) == 1
    for result in results:
        late = "Failed to create mdev" in result.err and "No space left on device (os error 28)" in result.err
        assert result.code == 0 or late or "No available instances of demo-big on demo0" in result.err, result
    assert len(world.devices()) == 2


def test_autostart_of_a_parents_definitions(world):
    world.define(A, "demo0", "demo-small", "auto", [{"note": "first"}])
    world.define(B, "demo0", "demo-small", "manual")
    world.define(C, "demo1", "demo-small", "auto")
    world.ok("start-parent-mdevs", "demo0")
    assert world.devices() == {(A, "demo0", "demo-small")}
    assert world.attribute(A, "note") == "first"
    again = world.run("start-parent-mdevs", "demo0")
    assert (again.code, world.devices()) == (0, {(A, "demo0", "demo-small")})


def test_a_script_changes_a_device_live_through_the_tree(world, tmp_path):
    actions = ["start", "stop", "define", "undefine", "modify", "attributes", "capabilities"]
    supported = json.dumps({"supports": {"version": 2, "actions": actions, "events": ["pre", "post", "notify", "get", "live"]}})
    world.callout(
        "demo.sh",
        f"""if [ $A = capabilities ]; then echo '{supported}'; exit 0; fi
device={world.root}/sys/bus/mdev/devices/$U
if [ $A = attributes ]; then printf '[{{"speed":"%s"}}]' $(cat $device/speed); fi
if [ $E = live ]; then echo 77 >$device/speed; fi""",
    )
    world.ok("start", "-u", A, "-p", "demo0", "-t", "demo-small")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"mdev_type": "demo-small", "start": "manual", "attrs": [{"speed": "77"}]}))
    world.ok("modify", "-u", A, "-p", "demo0", "--live", "--jsonfile", config)
    assert world.attribute(A, "speed") == "77"
    assert listed(world)["demo0"][A]["attrs"] == [{"speed": "77"}]


def test_list_of_a_thousand_devices_is_linear(world, capsys):
    create = world.root / "sys/class/mdev_bus/demo1/mdev_supported_types/demo-many/create"
    counts, costs = (0, 200, 1000), []
    for before, count in pairwise(counts):
        for _ in range(count - before):
            create.write_text(str(uuid4()))
        begun, spent = time.perf_counter(), processor_time(world)
        assert world.ok("list").count("\n") == count
        costs.append((time.perf_counter() - begun, processor_time(world) - spent))
    walls, times = zip(*costs, strict=True)
    slope = (times[1] - times[0]) / (counts[2] - counts[1])
    with capsys.disabled():
        told = ", ".join(f"{count} devices {wall:.2f} s" for count, wall in zip(counts[1:], walls, strict=True))
        sys.stdout.write(f"\nmdevctl list on the tree: {told}; {slope * 1e3:.2f} ms of processor time for each\n")
    # What grows with the square of the number would make it 25 times.
    assert times[1] < 5 * 1.6 * times[0]


def processor_time(world):
    """Return the seconds mdevctl and the mount have used so far; others on the machine do not count in these."""
    # proc_pid_stat(5): fields 14 and 15, in ticks.
    fields = Path(f"/proc/{world._processes[-1].pid}/stat").read_text().rpartition(")")[2].split()
    mount = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return mount + used.ru_utime + used.ru_stime
