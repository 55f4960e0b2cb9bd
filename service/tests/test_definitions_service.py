"""Definitions in a service that runs: the API, starting with the parent, what differs, and applying a list."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from contextlib import suppress

import pytest
from mdevkit.client import Client
from mdevkit.errors import MdevError
from mdevkit_service.attrs import compare, split

from tests.services import wait_until

A, B, C, D = (f"0a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00{digit}" for digit in "abcd")
P, Q, T, BIG = "demo0", "demo1", "demo-small", "demo-big"


@pytest.fixture
def write(service):
    """Writes a definition as somebody else would."""

    def put(uuid, parent=P, type_id=T, start="manual", attrs=(), **more):
        folder = service.definitions / parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / uuid).write_text(json.dumps({"mdev_type": type_id, "start": start, "attrs": list(attrs), **more}))

    return put


def devices(client):
    return {(device["uuid"], device["parent"], device["type"]) for device in client.get("/v1/devices")}


def definition(client, uuid, parent=P):
    [found] = client.get(f"/v1/definitions?uuid={uuid}&parent={parent}")
    return found


def place(uuid, parent=P):
    return f"/v1/definitions/{parent}/{uuid}"


def autostarted(service, client):
    """Wait until every parent's definitions have been tried."""

    def noted():
        try:
            return len(json.loads((service.runtime / "definitions.json").read_text())["started"]) == 4
        except FileNotFoundError:
            return False

    wait_until(noted)


# -- the API ---------------------------------------------------------------------------------------------------------------


def test_store_show_and_remove(service, client):
    stored = client.put(place(A), {"mdev_type": T, "start": "auto", "attrs": [{"speed": "5"}], "owner": "me"})
    assert stored == {
        "uuid": A,
        "parent": P,
        "mdev_type": T,
        "start": "auto",
        "attrs": [{"speed": "5"}],
        "path": str(service.definitions / P / A),
        "tag": stored["tag"],
        "owner": "me",
        "active": False,
        "drift": {},
        "error": None,
    }
    assert client.get("/v1/definitions") == [stored]
    assert client.get(f"/v1/definitions?parent={Q}") == []
    again = client.put(place(A), {"mdev_type": BIG})
    assert (again["mdev_type"], again["start"], again["attrs"], again["owner"]) == (BIG, "manual", [], "me")
    assert client.put(place(A), {"mdev_type": BIG, "owner": None})["owner"] is None
    client.delete(place(A))
    assert client.get("/v1/definitions") == []


def test_keys_nobody_knows_stay(service, client, write):
    write(A, more={"x": [1]})
    client.put(place(A), {"mdev_type": BIG})
    assert json.loads((service.definitions / P / A).read_text())["more"] == {"x": [1]}


@pytest.mark.parametrize(
    ("path", "body", "name", "words"),
    [
        (place(A), {"mdev_type": T, "attrs": [{"a": "1", "b": "2"}]}, "EINVAL", "too many fields"),
        (place(A), {"mdev_type": T, "attrs": [{"a": 1}]}, "EINVAL", "Expected `str`, got `int`"),
        (place(A), {"start": "auto"}, "EINVAL", "missing required field `mdev_type`"),
        (place("nothing"), {"mdev_type": T}, "EINVAL", "'nothing' is not a UUID"),
        (place(A, ".."), {"mdev_type": T}, "EINVAL", "is not the name of a parent"),
        (place(A, "scripts.d"), {"mdev_type": T}, "EINVAL", "is not the name of a parent"),
    ],
)
def test_what_cannot_be_stored(service, client, refused, path, body, name, words):
    refused(name, lambda: client.put(path, body), words)
    assert client.get("/v1/definitions") == []


def test_attributes_that_cannot_be_read_return_too_as_often_as_they_were_given(service, client):
    """As a vfio_ap definition has them: assign_adapter twice, and no way to ask for them."""
    attrs = [{"assign": "5"}, {"speed": "7"}, {"assign": "6"}, {"moody": "1"}, {"moody": "2"}]
    client.put(place(A), {"mdev_type": T, "attrs": attrs})
    assert client.post(f"{place(A)}/start")["state"] == "bound"
    client.put(f"/v1/devices/{A}/attributes/moody", {"value": "4"})
    client.put(f"/v1/devices/{A}/attributes/assign", {"value": "9"})  # an action of the moment, not part of the definition

    def attributes():
        device = client.get(f"/v1/devices/{A}")
        return device["state"] == "bound" and [device["attributes"][name] for name in ("assigned", "speed", "moody")]

    assert attributes() == ["5 6 9", "7", "4"]
    service.kill_host(P)
    assert wait_until(attributes) == ["5 6", "7", "4"]
    # The host knows it as well, for a service that has lost its own notes.
    service.kill_service()
    (service.runtime / "devices" / f"{A}.json").unlink()
    service.start()
    assert attributes() == ["5 6", "7", "4"]
    service.kill_host(P)
    assert wait_until(attributes) == ["5 6", "7", "4"]


def test_conditions(client, refused):
    first = client.put(place(A), {"mdev_type": T}, if_none_match="*")
    refused("EEXIST", lambda: client.put(place(A), {"mdev_type": BIG}, if_none_match="*"), "already defined")
    second = client.put(place(A), {"mdev_type": BIG}, if_match=first["tag"])
    refused("EAGAIN", lambda: client.put(place(A), {"mdev_type": T}, if_match=first["tag"]), "changed by somebody else")
    refused("EAGAIN", lambda: client.request("DELETE", place(A), if_match=first["tag"]), "changed by somebody else")
    assert definition(client, A)["tag"] == second["tag"]
    refused("ENODEV", lambda: client.delete(place(B)), f"Mediated device {P}/{B} is not defined")


def test_a_bad_file_is_named_and_stops_nothing(service, client, write):
    write(B, start="auto")
    (service.definitions / P / A).write_text("{oops")
    bad, good = client.get("/v1/definitions")
    assert (bad["uuid"], bad["mdev_type"], bad["path"]) == (A, "", str(service.definitions / P / A))
    assert bad["error"].startswith("invalid JSON: ")
    assert (good["uuid"], good["error"]) == (B, None)
    listed = service.mdevkit("list", "--defined")
    assert (listed.returncode, listed.stdout) == (0, f"{B} {P} {T} auto\n")
    assert f"{service.definitions / P / A}: invalid JSON: " in listed.stderr


def test_events_tell_of_definitions(client):
    with Client(client.path, start=False) as other:
        client.put(place(A), {"mdev_type": T})
        client.delete(place(A))
        events = [event for event in other.events(after=0, timeout=0.3) if event["subject"] == A]
    assert [(event["action"], event["env"]["DEFINITION"]) for event in events] == [("change", "stored"), ("change", "removed")]


# -- start -----------------------------------------------------------------------------------------------------------------


def test_start(client, refused, write):
    write(A, attrs=[{"speed": "5"}, {"moody": "4"}, {"speed": "0x10"}], owner="me")
    device = client.post(f"{place(A)}/start")
    assert (device["uuid"], device["parent"], device["type"], device["state"], device["owner"]) == (A, P, T, "bound", "me")
    attributes = client.get(f"/v1/devices/{A}")["attributes"]
    assert (attributes["speed"], attributes["moody"]) == ("16", "4")
    refused("EEXIST", lambda: client.post(f"{place(A)}/start"), f"UUID {A} is in use")
    assert client.post(f"{place(A)}/start?ensure=1")["uuid"] == A
    refused("ENODEV", lambda: client.post(f"{place(B)}/start"), f"Mediated device {P}/{B} is not defined")


def test_ensure_is_about_this_parent_and_type(client, refused, write):
    client.post("/v1/devices", {"uuid": A, "parent": P, "type": T})
    write(A, Q, T)
    write(A, P, BIG)
    refused("EEXIST", lambda: client.post(f"{place(A, Q)}/start?ensure=1"), "in use")
    refused("EEXIST", lambda: client.post(f"{place(A)}/start?ensure=1"), "in use")


@pytest.mark.parametrize(
    ("attrs", "name", "words"),
    [
        ([{"speed": "2000"}], "EINVAL", "2000 is not between 0 and 1000"),
        ([{"moody": "3"}], "ERANGE", "Failed to write 3 to attribute moody: "),
        ([{"moody": "2"}, {"serial": "3"}], "EACCES", "Failed to write 3 to attribute serial: "),
        ([{"nope": "3"}], "ENOENT", "has no attribute 'nope'"),
        ([{"note": "refuse"}], "EIO", "the demo hardware does not answer"),
    ],
)
def test_a_start_that_fails_leaves_nothing_but_its_reason(service, client, refused, write, attrs, name, words):
    write(A, attrs=attrs)
    refused(name, lambda: client.post(f"{place(A)}/start"), words)
    assert devices(client) == set()
    assert [name for name in service.files() if name.startswith("devices/")] == []
    assert words in definition(client, A)["error"]
    client.put(place(A), {"mdev_type": T})
    assert definition(client, A)["error"] is None


def test_fifty_starts_for_the_last_instance(service, client, write):
    write(A, type_id=BIG)
    uuids = [f"0a2f9f7c-1c1b-4a58-9c67-6a6d6ff1b0{number:02d}" for number in range(50)]
    for uuid in uuids:
        write(uuid, type_id=BIG)
    client.post(f"{place(A)}/start")
    won, lost = [], []

    def start(uuid):
        with service.client() as own:
            try:
                won.append(own.post(f"{place(uuid)}/start")["uuid"])
            except MdevError as error:
                lost.append(error)

    threads = [threading.Thread(target=start, args=(uuid,)) for uuid in uuids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert {error.name for error in lost} == {"ENOSPC"}
    assert devices(client) == {(A, P, BIG), (won[0], P, BIG)}
    assert sum(item["error"] is not None for item in client.get("/v1/definitions")) == 49


def test_one_uuid_on_two_parents_runs_once(service, client, write):
    for parent in (P, Q):
        write(A, parent)
    errors = []

    def start(parent):
        with service.client() as own:
            try:
                own.post(f"{place(A, parent)}/start")
            except MdevError as error:
                errors.append(error.name)

    threads = [threading.Thread(target=start, args=(parent,)) for parent in (P, Q)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["EEXIST"]
    assert len(devices(client)) == 1
    [one, other] = client.get(f"/v1/definitions?uuid={A}")
    running = one if one["active"] else other
    idle = other if one["active"] else one
    assert idle["drift"] == {"parent": {"defined": idle["parent"], "running": running["parent"]}}


# -- with the parent -------------------------------------------------------------------------------------------------------


def test_definitions_start_with_the_service(service, write):
    write(A, start="auto", attrs=[{"speed": "7"}, {"moody": "5"}])
    write(B, start="manual")
    write(C, Q, "no-such-type", start="auto")
    write(D, Q, BIG, start="auto")
    (service.definitions / Q / "zzz").write_text("x")
    (service.definitions / Q / B).write_text("{oops")
    with service.start().client() as client:
        autostarted(service, client)
        assert devices(client) == {(A, P, T), (D, Q, BIG)}
        assert client.get(f"/v1/devices/{A}")["attributes"]["moody"] == "5"
        assert "there is no type 'no-such-type'" in definition(client, C, Q)["error"]
        assert "invalid JSON" in definition(client, B, Q)["error"]
        failed = [event for event in client.events(after=0, timeout=0.2) if event["env"].get("DEFINITION") == "failed"]
        assert {event["subject"] for event in failed} == {B, C, "zzz"}


def test_a_service_that_comes_back_starts_nothing_twice(service, write):
    write(A, start="auto")
    write(B, start="auto")
    write(C, Q, "no-such-type", start="auto")
    with service.start().client() as client:
        autostarted(service, client)
        client.delete(f"/v1/devices/{B}")
    service.kill_service()
    with service.start().client() as client:
        assert devices(client) == {(A, P, T)}
        assert "no-such-type" in definition(client, C, Q)["error"]
    service.kill_host("demo0")
    with service.client() as client:
        wait_until(lambda: devices(client) == {(A, P, T), (B, P, T)})


def test_a_service_killed_while_it_configures(service, client, write):
    """The device is half made, and nobody was told of it: it goes, and the instance with it."""
    write(A, attrs=[{"hang": "1"}])

    def start():
        with service.client() as own, suppress(MdevError):
            own.post(f"{place(A)}/start")

    started = threading.Thread(target=start)
    started.start()
    wait_until(lambda: devices(client) == {(A, P, T)})
    service.kill_service()
    started.join()
    with service.start().client() as client:
        wait_until(lambda: devices(client) == set())
        [parent] = client.get(f"/v1/parents?parent={P}")
        assert [type_["available_instances"] for type_ in parent["types"] if type_["id"] == T] == [8]


def test_a_service_killed_while_it_starts_what_runs_already(service, tmp_path, write):
    """A start that will be refused puts nothing at risk, however long it waits for what was installed meanwhile."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    service.environment["PYTHONPATH"] += f":{plugins}"
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-demo,hangs"
    notes = service.runtime / "definitions.json"

    def unfinished():
        return json.loads(notes.read_text())["unfinished"]

    write(A, attrs=[{"moody": "4"}])
    with service.start().client() as client:
        client.post(f"{place(A)}/start")
        (plugins / "hangs.py").write_text("import time\ntime.sleep(60)\n")
        info = plugins / "hangs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hangs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[mdevkit.parents]\nhangs = hangs:parents\n")
        client._send("POST", f"{place(A)}/start?ensure=1", None, {})
        wait_until(lambda: unfinished() or select.select([client._socket], [], [], 0)[0])
        service.kill_service()
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-demo"
    with service.start().client() as client:
        wait_until(lambda: not unfinished())
        assert devices(client) == {(A, P, T)}


# -- what differs ----------------------------------------------------------------------------------------------------------


def test_drift(client, write):
    write(A, attrs=[{"speed": "0x10"}, {"note": "n"}, {"crash": "1"}])
    client.post("/v1/devices", {"uuid": A, "parent": P, "type": T, "attributes": {"speed": "16", "note": "n"}})
    assert definition(client, A)["active"]
    assert definition(client, A)["drift"] == {}
    client.put(f"/v1/devices/{A}/attributes/speed", {"value": "17"})
    assert definition(client, A)["drift"] == {"attrs": {"speed": {"defined": "0x10", "running": "17"}}}
    assert client.get("/v1/definitions?drift=0")[0]["drift"] == {}
    write(A, type_id=BIG)
    assert definition(client, A)["drift"] == {"mdev_type": {"defined": BIG, "running": T}}


FACTS = {
    "early": {"create": True, "mode": "r", "kind": "int"},
    "both": {"create": True, "mode": "rw", "kind": "bool"},
    "late": {"create": False, "mode": "rw", "kind": "text"},
    "write": {"create": False, "mode": "w", "kind": "text"},
}


def test_split():
    attrs = [{"late": "1"}, {"both": "1"}, {"early": "2"}, {"both": "0"}, {"late": "2"}, {"other": "3"}, {"write": "4"}]
    first, later = split(attrs, FACTS)
    assert first == {"both": "1", "early": "2", "other": "3"}
    assert later == [("late", "1"), ("both", "0"), ("late", "2"), ("write", "4")]
    with pytest.raises(MdevError, match="attribute early is given 2 times"):
        split([{"early": "1"}, {"early": "1"}], FACTS)


@pytest.mark.parametrize(
    ("name", "defined", "running", "same"),
    [
        ("early", "16", "16", True),
        ("early", "0x10", "16", True),
        ("early", "ten", "10", False),
        ("both", "yes", "1", True),
        ("both", "no", "1", False),
        ("late", "0x10", "16", False),
    ],
)
def test_compare(name, defined, running, same):
    assert (compare([{name: "first"}, {name: defined}], {name: running}, FACTS) == {}) == same


# -- apply -----------------------------------------------------------------------------------------------------------------


def want(uuid, parent=P, type_id=T, start="auto", attrs=()):
    return {"uuid": uuid, "parent": parent, "mdev_type": type_id, "start": start, "attrs": list(attrs)}


def apply(client, *wanted, **options):
    changes = client.post("/v1/apply", {"definitions": list(wanted), **options})["changes"]
    return [" ".join([change["action"], change["uuid"][-1], change["detail"] or "-", change["error"] or "-"]) for change in changes]


def test_apply_makes_what_is_wanted_and_then_nothing(client):
    wanted = [want(A, attrs=[{"speed": "5"}]), want(B, Q, BIG, "manual")]
    plan = ["define a - -", "define b - -", "start a - -"]
    assert apply(client, *wanted, dry_run=True) == plan
    assert (devices(client), client.get("/v1/definitions")) == (set(), [])
    assert apply(client, *wanted) == plan
    assert devices(client) == {(A, P, T)}
    assert apply(client, *wanted) == []


def test_apply_changes_as_little_as_will_do(client):
    apply(client, want(A, attrs=[{"speed": "5"}]), want(B), want(C, Q))
    since = client.get(f"/v1/devices/{A}")
    assert apply(client, want(A, attrs=[{"speed": "6"}]), want(B), want(C, Q, BIG)) == [
        "modify a attrs -",
        "modify c mdev_type -",
        "set a speed=6 -",
        "restart-needed c type demo-small becomes demo-big -",
    ]
    assert client.get(f"/v1/devices/{A}")["attributes"] == {**since["attributes"], "speed": "6"}
    assert (C, Q, T) in devices(client)
    assert apply(client, want(C, Q, BIG), restart=True) == ["restart c type demo-small becomes demo-big -"]
    assert devices(client) == {(A, P, T), (B, P, T), (C, Q, BIG)}


def test_apply_prunes_its_own_only(client, write):
    write(D, owner="somebody")
    client.post("/v1/devices", {"uuid": D, "parent": P, "type": T, "owner": "somebody"})
    apply(client, want(A), want(B), owner="me")
    assert apply(client, want(B), owner="me", prune=True) == ["stop a - -", "undefine a - -"]
    assert apply(client, owner="nobody", prune=True) == []
    assert apply(client, prune=True) == []
    assert devices(client) == {(B, P, T), (D, P, T)}
    assert {item["owner"] for item in client.get("/v1/definitions")} == {"me", "somebody"}


def test_apply_moves_a_device_with_its_uuid(client):
    apply(client, want(A))
    assert apply(client, want(A, Q), prune=True) == ["stop a - -", "undefine a - -", "define a - -", "start a - -"]
    assert devices(client) == {(A, Q, T)}
    assert [item["parent"] for item in client.get("/v1/definitions")] == [Q]


def test_apply_goes_on_after_a_failure(client):
    wanted = [want(A, type_id="nope"), want(B, attrs=[{"moody": "3"}]), want(C)]
    changes = client.post("/v1/apply", {"definitions": wanted})["changes"]
    errors = {(change["action"], change["uuid"]): change["error"] for change in changes if change["error"]}
    assert list(errors) == [("start", A), ("start", B)]
    assert "there is no type 'nope'" in errors["start", A]
    assert "Failed to write 3 to attribute moody" in errors["start", B]
    assert devices(client) == {(C, P, T)}


def test_apply_leaves_who_is_in_use(service, client):
    apply(client, want(A))
    client.put(f"/v1/devices/{A}/attributes/client", {"value": "a guest"})
    [stop, undefine] = client.post("/v1/apply", {"definitions": [], "prune": True})["changes"]
    assert "is in use by a guest" in stop["error"]
    assert undefine["error"] == "the device still runs"
    assert definition(client, A)["active"]


def test_apply_repairs_a_bad_file(service, client, write):
    write(B)
    (service.definitions / P / A).write_text("{oops")
    assert apply(client, prune=True, dry_run=True) == ["undefine b - -"]
    assert apply(client, want(A, start="manual")) == ["modify a the file cannot be used -"]
    assert definition(client, A)["error"] is None


@pytest.mark.parametrize(
    ("wanted", "name", "words"),
    [
        ([want("x")], "EINVAL", "'x' is not a UUID"),
        ([want(A), want(A.upper(), Q)], "EINVAL", "is in the list twice"),
        ([want(A, "../x")], "EINVAL", "is not the name of a parent"),
        ([want(A, attrs=[{"a": "1", "b": "2"}])], "EINVAL", "too many fields"),
        ([want(D)], "EPERM", f"definition {P}/{D} belongs to 'somebody'"),
    ],
)
def test_apply_refuses_the_whole(client, refused, write, wanted, name, words):
    write(D, owner="somebody")
    refused(name, lambda: client.post("/v1/apply", {"definitions": [want(B), *wanted]}), words)
    assert [item["uuid"] for item in client.get("/v1/definitions")] == [D]


def test_notes_that_cannot_be_read_cost_the_notes_only(service, write):
    service.runtime.mkdir(mode=0o700)
    (service.runtime / "definitions.json").write_text("{oops")
    write(A, start="auto")
    with service.start().client() as client:
        autostarted(service, client)
        assert devices(client) == {(A, P, T)}
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.process.wait(15) == 0
