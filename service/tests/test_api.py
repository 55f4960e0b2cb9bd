"""The control API as a client meets it: parents, devices, attributes, drivers, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest
from mdevkit.client import Client
from mdevkit.errors import MdevError

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "c4c5a1a3-2bd4-4f83-8c9e-0a55d0d1b0aa"


@pytest.fixture
def service(shared):
    """One service for all of these: none of them stops it."""
    with shared.client() as client:
        for device in client.get("/v1/devices"):
            client.delete(f"/v1/devices/{device['uuid']}?force=1")
        client.put("/v1/parents/demo0/attributes/label", {"value": "none"})
    return shared


@pytest.fixture
def client(service):
    """A client of it."""
    with service.client() as client:
        yield client


def create(client, **wish):
    return client.post("/v1/devices", {"type": "demo-small", **wish})


# -- what there is ---------------------------------------------------------------------------------------------------------


def test_version_tells_who_answers(service, client):
    facts = client.get("/v1/version")
    assert facts == {
        "version": "0.1.0",
        "api": 1,
        "pid": service.process.pid,
        "runtime": str(service.runtime),
        "definitions": str(service.definitions),
    }


def test_parents_with_types_and_attributes(client):
    parents = {parent["name"]: parent for parent in client.get("/v1/parents")}
    assert set(parents) == {"demo0", "demo1", "twin0", "twin1"}
    demo = parents["demo0"]
    assert (demo["driver"], demo["host"], demo["attributes"]) == ("demo", "demo0", {"label": "none", "crash_on_create": "0"})
    assert parents["twin1"]["host"] == "twins"
    room = {type_["id"]: type_["available_instances"] for type_ in demo["types"]}
    assert room == {"demo-small": 8, "demo-big": 2, "demo-many": 2**31 - 1}
    speed = next(info for info in demo["types"][0]["device_attributes"] if info["name"] == "speed")
    assert speed == {
        "name": "speed",
        "kind": "int",
        "doc": "Any number.",
        "mode": "rw",
        "create": True,
        "default": "10",
        "counter": False,
    }


def test_one_parent_alone(client):
    assert [parent["name"] for parent in client.get("/v1/parents?parent=twin1")] == ["twin1"]


def test_the_instances_that_are_left_are_told_live(client):
    create(client, type="demo-big", parent="demo1")
    (parent,) = client.get("/v1/parents?parent=demo1")
    assert {type_["id"]: type_["available_instances"] for type_ in parent["types"]}["demo-small"] == 4


def test_parent_attributes_are_read_and_stored(client, refused):
    path = "/v1/parents/demo0/attributes/label"
    assert client.get(path) == {"value": "none"}
    assert client.put(path, {"value": "left"}) is None
    assert client.get(path) == {"value": "left"}
    refused("ENOENT", lambda: client.get("/v1/parents/demo0/attributes/nothing"), "has no attribute 'nothing'", "label")
    refused("EINVAL", lambda: client.put("/v1/parents/demo0/attributes/crash_on_create", {"value": "perhaps"}), "yes or no")


def test_type_attributes_are_read_and_stored(client, refused):
    folder = "/v1/parents/demo0/types/demo-big/attributes"
    assert client.get(f"{folder}/weight") == {"value": "1"}
    assert client.put(f"{folder}/weight", {"value": "0x10"}) is None
    assert client.get(f"{folder}/weight") == {"value": "16"}
    assert client.get(f"{folder}/vendor/revision") == {"value": "3"}
    refused("EACCES", lambda: client.put(f"{folder}/vendor/revision", {"value": "4"}), "is read-only")
    refused("EINVAL", lambda: client.put(f"{folder}/weight", {"value": "101"}), "101 is not between 0 and 100")
    refused("ENOENT", lambda: client.get(f"{folder}/nothing"), "type demo-big has no attribute 'nothing'", "weight")
    refused("ENODEV", lambda: client.get("/v1/parents/demo0/types/nothing/attributes/weight"), "nothing")
    (parent,) = client.get("/v1/parents?parent=demo0")
    big = next(type_ for type_ in parent["types"] if type_["id"] == "demo-big")
    assert big["attributes"] == {"weight": "16", "vendor/revision": "3"}
    assert [(info["name"], info["mode"]) for info in big["attribute_info"]] == [("weight", "rw"), ("vendor/revision", "r")]


def test_counters(client):
    create(client, uuid=UUID)
    create(client, uuid=OTHER, parent="twin1")
    for number in (1, 2):
        client.put(f"/v1/devices/{UUID}/attributes/assign", {"value": str(number)})
    assert client.get("/v1/counters") == {UUID: {"count": [2], "counts": [2, 0]}, OTHER: {"count": [0], "counts": [0, 0]}}
    (parent,) = client.get("/v1/parents?parent=demo0")
    infos = parent["types"][0]["device_attributes"]
    assert [info["name"] for info in infos if info["counter"]] == ["count", "counts", "odd"]


def test_a_device_without_its_attributes(client, refused):
    create(client, uuid=UUID)
    whole = client.get(f"/v1/devices/{UUID}")
    assert whole["attributes"]["speed"] == "10"
    assert client.get(f"/v1/devices/{UUID}?attributes=0") == whole | {"attributes": {}}
    assert client.get(f"/v1/devices/{UUID}?attributes=1") == whole
    refused("EINVAL", lambda: client.get(f"/v1/devices/{UUID}?attributes=some"), "attributes is 1 or 0, not 'some'")


def test_drivers_and_what_they_have_bound(client):
    create(client, uuid=UUID)
    assert client.get("/v1/drivers") == [{"name": "demo_drv", "bus": "demo", "bound": [UUID]}]


def test_hosts(service, client):
    hosts = {host["key"]: host for host in client.get("/v1/hosts")}
    assert {key: host["parents"] for key, host in hosts.items()} == {
        "demo0": ["demo0"],
        "demo1": ["demo1"],
        "twins": ["twin0", "twin1"],
    }
    assert {key: host["pid"] for key, host in hosts.items()} == service.hosts()
    assert all(host["state"] == "running" and host["memory"] > 0 for host in hosts.values())


# -- life of a device ------------------------------------------------------------------------------------------------------


def test_create_show_remove(service, client, refused):
    device = create(client, uuid=UUID.upper(), attributes={"speed": "0x10"}, owner="me", parent="demo1")
    path = str(service.runtime / "devices" / f"{UUID}.sock")
    assert device == {
        "uuid": UUID,
        "parent": "demo1",
        "type": "demo-small",
        "bus": "demo",
        "device_api": "demo",
        "state": "bound",
        "driver": "demo_drv",
        "driver_override": None,
        "modalias": "demo:c01",
        "error": None,
        "owner": "me",
        "endpoint": {"kind": "demo", "socket": path, "client": ""},
        "attach": {"qemu": ["-demo", path]},
        "suspended": False,
    }
    assert stat.S_IMODE(Path(path).lstat().st_mode) == 0o600
    assert client.get("/v1/devices") == [device]
    shown = client.get(f"/v1/devices/{UUID}")
    assert shown.pop("attributes") == {
        "speed": "16",
        "note": "",
        "moody": "0",
        "client": "",
        "line": "",
        "serial": f"demo {UUID}",
        "assigned": "",
        "count": "0",
        "counts": "0 0",
        "odd": "many",
    }
    assert shown == device
    assert client.delete(f"/v1/devices/{UUID}") is None
    assert client.get("/v1/devices") == []
    refused("ENODEV", lambda: client.get(f"/v1/devices/{UUID}"), f"there is no device {UUID}")
    assert not [name for name in service.files() if name.startswith("devices/")]


def test_create_makes_up_a_uuid_and_finds_a_parent_with_room(client):
    parents = [create(client, type="demo-big")["parent"] for _ in range(8)]
    assert sorted(parents) == ["demo0", "demo0", "demo1", "demo1", "twin0", "twin0", "twin1", "twin1"]
    assert len({device["uuid"] for device in client.get("/v1/devices")}) == 8


def test_no_room_says_who_holds_it(client, refused):
    for _ in range(2):
        holder = create(client, type="demo-big", parent="demo0")["uuid"]
    refused("ENOSPC", lambda: create(client, parent="demo0"), "1 of 8 slots wanted, 0 free", holder)


def test_devices_of_one_parent_in_the_order_they_came(client):
    uuids = [create(client, parent="demo1")["uuid"] for _ in range(3)]
    create(client, parent="demo0")
    assert [device["uuid"] for device in client.get("/v1/devices?parent=demo1")] == uuids


@pytest.mark.parametrize(
    ("wish", "name", "words"),
    [
        ({"uuid": "nonsense"}, "EINVAL", "is not a UUID"),
        ({"type": "demo-huge"}, "ENODEV", "there is no type 'demo-huge' (there are: demo-big, demo-many, demo-small)"),
        ({"parent": "demo9"}, "ENODEV", "there is no parent 'demo9' (there are: demo0, demo1, twin0, twin1)"),
        ({"attributes": {"speed": "1001"}}, "EINVAL", "1001 is not between 0 and 1000"),
        ({"attributes": {"colour": "red"}}, "ENOENT", "has no attribute 'colour'"),
        ({"attributes": {"moody": "1"}}, "EACCES", "cannot be set at creation"),
        ({"attributes": {"note": "refuse"}}, "EIO", "the demo hardware does not answer"),
        ({"driver_override": "nobody"}, "ENODEV", "there is no driver nobody on bus demo"),
        ({"socket": "relative.sock"}, "EINVAL", "'relative.sock' is not an absolute path"),
        ({"socket": "/nowhere/at/all.sock"}, "ENOENT", "the folder /nowhere/at does not exist"),
        ({"socket": "/tmp/" + "x" * 110}, "ENAMETOOLONG", "a socket's path may have 107"),
        ({"colour": "red"}, "EINVAL", "unknown field `colour`"),
        ({"type": 7}, "EINVAL", "Expected `str`, got `int`"),
    ],
)
def test_a_create_that_fails_says_why_and_leaves_nothing(service, client, refused, wish, name, words):
    refused(name, lambda: create(client, **{"uuid": UUID, **wish}), words)
    assert client.get("/v1/devices") == []
    assert not [name for name in service.files() if name.startswith("devices/")]
    create(client, uuid=UUID)


def test_a_uuid_is_unique_over_all_hosts(client, refused):
    create(client, uuid=UUID, parent="demo0")
    words = f"UUID {UUID} is in use by a device of type demo-small on parent demo0"
    refused("EEXIST", lambda: create(client, uuid=UUID, parent="demo1"), words)


def test_dry_run_tells_without_doing(client, refused):
    device = create(client, uuid=UUID, dry_run=True, parent="demo1")
    assert (device["state"], device["parent"]) == ("planned", "demo1")
    refused("EINVAL", lambda: create(client, dry_run=True, attributes={"speed": "x"}), "a whole number is wanted")
    for _ in range(2):
        create(client, type="demo-big", parent="demo0")
    refused("ENOSPC", lambda: create(client, dry_run=True, parent="demo0"), "0 free")
    assert len(client.get("/v1/devices")) == 2


def test_an_endpoint_where_it_was_asked_for(client, tmp_path):
    path = str(tmp_path / "my.sock")
    assert create(client, uuid=UUID, socket=path)["endpoint"]["socket"] == path
    assert stat.S_ISSOCK(os.lstat(path).st_mode)
    client.delete(f"/v1/devices/{UUID}")
    assert not os.path.lexists(path)


def test_a_device_in_use_is_not_removed_unless_by_force(client, refused):
    create(client, uuid=UUID)
    client.put(f"/v1/devices/{UUID}/attributes/client", {"value": "pid 4711"})
    refused("EBUSY", lambda: client.delete(f"/v1/devices/{UUID}?timeout=0.05"), "in use by pid 4711")
    assert client.get(f"/v1/devices/{UUID}")["state"] == "bound"
    client.delete(f"/v1/devices/{UUID}?force=1&timeout=0.05")
    assert client.get("/v1/devices") == []


def test_a_second_remove_while_one_runs_is_again(service, client, refused):
    create(client, uuid=UUID)
    client.put(f"/v1/devices/{UUID}/attributes/client", {"value": "pid 4711"})
    with service.client() as other:
        first = threading.Thread(target=refused, args=("EBUSY", lambda: other.delete(f"/v1/devices/{UUID}?timeout=1")))
        first.start()
        while client.get(f"/v1/devices/{UUID}")["state"] != "removing":
            pass
        refused("EAGAIN", lambda: client.delete(f"/v1/devices/{UUID}"), "is being removed; try again")
        first.join()


# -- attributes ------------------------------------------------------------------------------------------------------------


def test_attributes_are_read_and_stored_live(client, refused):
    create(client, uuid=UUID)
    path = f"/v1/devices/{UUID}/attributes"
    client.put(f"{path}/speed", {"value": "77"})
    assert client.get(f"{path}/speed") == {"value": "77"}
    refused("EACCES", lambda: client.put(f"{path}/serial", {"value": "1"}), "is read-only")
    refused("EACCES", lambda: client.get(f"{path}/crash"), "cannot be read")
    refused("ENOENT", lambda: client.get(f"{path}/colour"), "has no attribute 'colour'")
    refused("EINVAL", lambda: client.put(f"{path}/speed", {"value": "fast"}), "a whole number is wanted, not 'fast'")


def test_several_attributes_are_stored_all_or_none(client, refused):
    create(client, uuid=UUID)
    client.patch(f"/v1/devices/{UUID}", {"attributes": {"speed": "5", "moody": "2", "note": "x"}})
    # One that cannot be parsed is found before anything is stored, one the vendor refuses after.
    for bad in ({"speed": "6", "note": "y", "moody": "11"}, {"speed": "6", "note": "y", "moody": "3"}):
        number = "EINVAL" if bad["moody"] == "11" else "ERANGE"
        refused(number, lambda bad=bad: client.patch(f"/v1/devices/{UUID}", {"attributes": bad}))
        attributes = client.get(f"/v1/devices/{UUID}")["attributes"]
        assert (attributes["speed"], attributes["moody"], attributes["note"]) == ("5", "2", "x")


# -- drivers ---------------------------------------------------------------------------------------------------------------


def test_bind_and_unbind(client, refused):
    device = create(client, uuid=UUID, bind=False)
    assert (device["state"], device["driver"], device["endpoint"]) == ("unbound", None, None)
    assert client.post(f"/v1/devices/{UUID}/bind", {})["driver"] == "demo_drv"
    refused("EBUSY", lambda: client.post(f"/v1/devices/{UUID}/bind", {"driver": "demo_drv"}), "is bound to driver demo_drv")
    assert client.post(f"/v1/devices/{UUID}/unbind")["state"] == "unbound"
    refused("ENODEV", lambda: client.post(f"/v1/devices/{UUID}/unbind"), "is bound to no driver")
    refused("ENODEV", lambda: client.post(f"/v1/devices/{UUID}/bind", {"driver": "nobody"}), "there is no driver nobody")
    refused("EINVAL", lambda: client.post(f"/v1/devices/{UUID}/bind", {"override": True}), "override needs a driver")
    assert client.post(f"/v1/devices/{UUID}/bind", {"driver": "demo_drv", "override": True})["driver_override"] == "demo_drv"


def test_driver_override_keeps_others_away(client, refused):
    create(client, uuid=UUID, bind=False)
    assert client.post(f"/v1/devices/{UUID}/driver_override", {"driver": "special"})["driver_override"] == "special"
    refused("ENODEV", lambda: client.post(f"/v1/devices/{UUID}/bind"), "special")
    client.post(f"/v1/devices/{UUID}/driver_override", {"driver": None})
    assert client.post(f"/v1/devices/{UUID}/bind")["state"] == "bound"


# -- HTTP ------------------------------------------------------------------------------------------------------------------


def test_errors_are_problem_details(client, problem_of):
    create(client, uuid=UUID)
    status, fields, problem = problem_of("POST", "/v1/devices", {"type": "demo-small", "uuid": UUID})
    assert (status, fields["content-type"]) == (409, "application/problem+json")
    assert problem == {
        "type": "https://mdevkit.invalid/errors/EEXIST",
        "title": "File exists",
        "status": 409,
        "detail": f"UUID {UUID} is in use by a device of type demo-small on parent demo0",
        "errno": "EEXIST",
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "name", "words"),
    [
        ("GET", "/v1/nothing", None, 404, "ENOENT", "there is no /v1/nothing"),
        ("PUT", "/v1/devices", {}, 405, "EOPNOTSUPP", "/v1/devices knows no PUT"),
        ("GET", "/v1/devices/xyz", None, 400, "EINVAL", "'xyz' is not a UUID"),
        ("DELETE", f"/v1/devices/{UUID}?force=maybe", None, 400, "EINVAL", "force is 1 or 0, not 'maybe'"),
        ("DELETE", f"/v1/devices/{UUID}?timeout=-1", None, 400, "EINVAL", "timeout is a number from 0 on, not '-1'"),
        ("GET", "/v1/events?after=x", None, 400, "EINVAL", "after is a number from 0 on, not 'x'"),
        ("POST", "/v1/devices", ["no", "object"], 400, "EINVAL", "Expected `object`, got `array`"),
        ("POST", "/v1/devices", {}, 400, "EINVAL", "missing required field `type`"),
        ("POST", "/v1/devices", {"type": "x" * 2_000_000}, 500, "EMSGSIZE", "a body has at most 1048576 bytes"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(client, problem_of, method, path, body, status, name, words):
    got, fields, problem = problem_of(method, path, body)
    assert (got, problem["status"], problem["errno"]) == (status, status, name)
    assert fields["content-type"] == "application/problem+json"
    assert words in problem["detail"]


def test_a_client_that_leaves_in_the_middle_of_a_create_stops_nothing(service, client):
    last = list(service.client().events(after=0, timeout=0.1))[-1]["seq"]
    with service.client() as hasty:
        hasty._send("POST", "/v1/devices", {"type": "demo-small", "uuid": UUID, "attributes": {"note": "slow 0.3"}}, {})
    assert client.get("/v1/devices") == []
    with service.client() as watcher:
        for event in watcher.events(after=last, timeout=5):
            if event["action"] == "bind" and event["subject"] == UUID:
                break
    (device,) = client.get("/v1/devices")
    assert device["uuid"] == UUID


def test_the_document_in_docs_is_up_to_date():
    from mdevkit_service.openapi import text

    kept = Path(__file__).parents[2] / "docs" / "api" / "openapi.json"
    assert kept.read_text() == text(), "run: python -m mdevkit_service.openapi docs/api/openapi.json"


def test_every_operation_is_in_the_document():
    from mdevkit_service.app import OPERATIONS
    from mdevkit_service.openapi import document

    paths = document()["paths"]
    assert {(path, method.upper()) for path, methods in paths.items() for method in methods} == {
        (operation.path, operation.method) for operation in OPERATIONS
    }
    assert "Device" in document()["components"]["schemas"]
    json.dumps(paths)


# -- many at once ----------------------------------------------------------------------------------------------------------


def race(service, count, wish):
    """Create `count` devices at the same moment, each on a connection of its own; return what became of each."""
    barrier, results = threading.Barrier(count), []

    def run(index):
        with Client(service.socket, start=False) as client:
            client.get("/v1/version")
            barrier.wait()
            try:
                results.append(client.post("/v1/devices", wish(index))["uuid"])
            except MdevError as error:
                results.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_fifty_want_the_last_instance_and_one_gets_it(service, client):
    create(client, type="demo-big", parent="demo0")
    for _ in range(3):
        create(client, parent="demo0")
    results = race(service, 50, lambda _index: {"type": "demo-small", "parent": "demo0"})
    losers = [result for result in results if isinstance(result, MdevError)]
    assert len(losers) == 49
    assert all(loser.name == "ENOSPC" and "0 free" in str(loser) for loser in losers)
    assert len(client.get("/v1/devices")) == 5


def test_the_same_uuid_on_two_parents_has_one_winner(service, client):
    for _ in range(5):
        results = race(service, 10, lambda index: {"type": "demo-small", "uuid": UUID, "parent": f"demo{index % 2}"})
        losers = [result for result in results if isinstance(result, MdevError)]
        assert [result for result in results if result not in losers] == [UUID]
        assert {loser.name for loser in losers} == {"EEXIST"}
        client.delete(f"/v1/devices/{UUID}")
