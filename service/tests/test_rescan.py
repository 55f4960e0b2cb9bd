"""Plugins that come and go while the service runs: real pip, in an environment the service was started from."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
from mdevkit_service.hosts import ASK_LIMIT

from tests.services import alive, wait_until

UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00c"
BROKEN = "raise RuntimeError('half an installation')\n"
DRIVER = "import mdevkit_demo\n\n\nclass LateDriver(mdevkit_demo.DemoDriver):\n    name = 'late_drv'\n"


def code(name, key="", label="none"):
    """A parent like the demo's, of that name."""
    return (
        "import mdevkit_demo\n\n\ndef parents():\n"
        f"    parent = mdevkit_demo.DemoParent({name!r}, {key!r})\n"
        f"    parent.label = {label!r}\n    return parent\n"
    )


class Environment:
    """A virtual environment that sees this project as the one the tests run in does, and has a pip of its own."""

    def __init__(self, folder):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        ours = sysconfig.get_path("purelib")
        (self.site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")

    def wheel(self, name, body, entries, version="1.0"):
        """Make a wheel with one module."""
        path = self.folder / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.py", body)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/entry_points.txt", entries)
            archive.writestr(f"{info}/RECORD", "")
        return path

    def pip(self, *words):
        subprocess.run([self.python, "-m", "pip", *words], check=True, capture_output=True)

    def install(self, name, body=None, entries=None, version="1.0"):
        entries = entries or f"[mdevkit.parents]\n{name} = {name}:parents\n"
        self.pip("install", "--no-index", "--upgrade", self.wheel(name, body or code(name), entries, version))

    def uninstall(self, name):
        self.pip("uninstall", "-y", name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def environment(prepared, service):
    """What the service will be started from; a test leaves nothing in it."""
    service.python = prepared.python
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-demo,late"
    yield prepared
    prepared.uninstall("late")


def parents(client):
    return {parent["name"] for parent in client.get("/v1/parents")}


def label(client):
    (late,) = [parent["attributes"]["label"] for parent in client.get("/v1/parents") if parent["name"] == "late"]
    return late


DEMO = {"demo0", "demo1", "twin0", "twin1"}
#: A plugin that can be asked for its parents, and whose host never gets to serve them.
HANGS = "import time\nfrom pathlib import Path\n\nif Path('/proc/self/comm').read_text() == 'mdev late\\n':\n    time.sleep(90)\n\n"


def test_a_parent_that_is_installed_can_be_used_at_once_and_goes_when_it_is_removed(environment, service, client, refused):
    wish = {"type": "demo-small", "parent": "late", "uuid": UUID}
    before = service.hosts()
    refused("ENODEV", lambda: client.post("/v1/devices", wish), "there is no parent 'late'")
    environment.install("late")
    assert client.post("/v1/devices", wish)["state"] == "bound"
    assert parents(client) == {*DEMO, "late"}
    hosts = service.hosts()
    assert before.items() <= hosts.items()
    environment.uninstall("late")
    assert parents(client) == {*DEMO, "late"}, "a parent with a device stays"
    assert client.get(f"/v1/devices/{UUID}")["state"] == "bound"
    client.delete(f"/v1/devices/{UUID}")
    assert parents(client) == DEMO
    wait_until(lambda: not alive(hosts["late"]), what="its host's end")
    refused("ENODEV", lambda: client.post("/v1/devices", wish), "there is no parent 'late'")


def test_a_plugin_with_a_parent_of_anothers_name_harms_nobody_but_itself(environment, service, client, refused):
    client.post("/v1/devices", {"type": "demo-small", "parent": "demo0", "uuid": UUID})
    environment.install("late", code("demo0"))
    sentence = "parent demo0 is plugin demo's: remove one of the two"
    refused("ENODEV", lambda: client.post("/v1/devices", {"type": "nope"}), "there is no type 'nope'")
    (failed,) = [host for host in client.get("/v1/hosts") if host["state"] == "failed"]
    assert (failed["key"], failed["error"]) == ("late", sentence)
    # Nor does it when both are there from the start.
    service.stop()
    service.start()
    with service.client() as later:
        assert later.get(f"/v1/devices/{UUID}")["state"] == "bound"
        assert later.post("/v1/devices", {"type": "demo-small", "parent": "demo0"})["state"] == "bound"
        assert [host["error"] for host in later.get("/v1/hosts") if host["state"] == "failed"] == [sentence]


def test_what_comes_and_goes_is_told_as_an_event_without_a_question(environment, service, client):
    watcher = service.client().events(timeout=30)
    environment.install("late")
    assert next(event["env"] for event in watcher if event["subject"] == "late") == {"MDEV_STATE": "registered"}
    environment.uninstall("late")
    assert next(event["env"] for event in watcher if event["subject"] == "late") == {"MDEV_STATE": "unregistered"}


def test_the_definitions_of_a_parent_that_is_installed_are_started(environment, service, client):
    client.put(f"/v1/definitions/late/{UUID}", {"mdev_type": "demo-small", "start": "auto"})
    environment.install("late")
    assert parents(client) == {*DEMO, "late"}
    wait_until(lambda: [device["parent"] for device in client.get("/v1/devices")] == ["late"], what="the start")


def test_another_version_takes_the_place_of_the_first_where_no_device_holds_it(environment, service, client):
    environment.install("late", code("late", label="one"))
    assert parents(client) == {*DEMO, "late"}
    environment.install("late", code("late", label="two"), version="2.0")
    assert label(client) == "two"
    client.post("/v1/devices", {"type": "demo-small", "parent": "late", "uuid": UUID})
    environment.install("late", code("late", label="three"), version="3.0")
    assert label(client) == "two", "a device is not disturbed"
    client.delete(f"/v1/devices/{UUID}")
    wait_until(lambda: label(client) == "three", what="the exchange")


def test_a_host_that_hangs_in_its_start_holds_up_nobody_when_its_plugin_is_exchanged(environment, service, client):
    environment.install("late", HANGS + code("late"))
    with service.client() as asking:
        asking._send("GET", "/v1/parents", None, {})
        hanging = wait_until(lambda: service.hosts().get("late"), what="the host's start")
        environment.install("late", version="2.0")
        wait_until(lambda: parents(client) == {*DEMO, "late"}, what="the exchange")
    wait_until(lambda: not alive(hanging), what="the end of the host that hangs")
    began = time.monotonic()
    parents(client)
    assert time.monotonic() - began < ASK_LIMIT - 1, "every request waits for a rescan that never ends"


def test_a_parent_that_belongs_into_a_host_with_devices_waits_for_their_end(environment, service, client, refused):
    client.post("/v1/devices", {"type": "demo-small", "parent": "twin0", "uuid": UUID})
    environment.install("late", code("late", "twins"))
    assert parents(client) == DEMO
    (busy,) = [host["error"] for host in client.get("/v1/hosts") if host["state"] == "failed"]
    assert busy == "parent late belongs into host twins, which has devices; remove them, then: mdevkit service rescan"
    client.delete(f"/v1/devices/{UUID}")
    assert service.mdevkit("service", "rescan").returncode == 0
    assert parents(client) == {*DEMO, "late"}
    assert client.post("/v1/devices", {"type": "demo-small", "parent": "late"})["state"] == "bound"
    assert client.post("/v1/devices", {"type": "demo-small", "parent": "twin0"})["state"] == "bound"


def test_a_plugin_that_does_not_work_is_told_of_and_tried_again_when_it_is_mended(environment, service, client):
    environment.install("late", BROKEN)
    assert parents(client) == DEMO
    (broken,) = [host for host in client.get("/v1/hosts") if host["state"] == "failed"]
    assert (broken["key"], "half an installation" in broken["error"]) == ("late", True)
    (environment.site / "late.py").write_text(code("late"))
    said = service.mdevkit("service", "rescan")
    assert (said.returncode, said.stderr) == (0, "")
    assert [line for line in said.stdout.splitlines() if "host        late pid" in line and line.endswith("running")]
    assert parents(client) == {*DEMO, "late"}


def test_an_editable_install_is_found_too(environment, service, client, tmp_path):
    (tmp_path / "late.py").write_text(code("late"))
    info = environment.site / "late-1.0.dist-info"
    info.mkdir()
    for name, text in {
        "METADATA": "Metadata-Version: 2.1\nName: late\nVersion: 1.0\n",
        "RECORD": "late-1.0.dist-info/METADATA,,\nlate-1.0.dist-info/RECORD,,\nlate-1.0.dist-info/entry_points.txt,,\nlate.pth,,\n",
        "entry_points.txt": "[mdevkit.parents]\nlate = late:parents\n",
    }.items():
        (info / name).write_text(text)
    (environment.site / "late.pth").write_text(f"{tmp_path}\n")
    assert parents(client) == {*DEMO, "late"}


def test_a_driver_that_is_installed_can_be_bound_in_a_host_that_runs(environment, service, client, refused):
    client.post("/v1/devices", {"type": "demo-small", "parent": "demo0", "uuid": UUID, "bind": False})
    bind = {"driver": "late_drv", "override": True}
    refused("ENODEV", lambda: client.post(f"/v1/devices/{UUID}/bind", bind), "there is no driver late_drv on bus demo")
    pid = service.hosts()["demo0"]
    environment.install("late", DRIVER, "[mdevkit.drivers]\nlate_drv.demo.c01 = late:LateDriver\n")
    assert client.post(f"/v1/devices/{UUID}/bind", bind)["driver"] == "late_drv"
    assert service.hosts()["demo0"] == pid
