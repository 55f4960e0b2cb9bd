"""The event stream: everything in order, each once, over restarts of service and hosts; or it is said that some are lost."""

from __future__ import annotations

import pytest
from mdevkit_service.journal import CAPACITY, Journal

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"


def brief(events):
    return [(event["action"], event["subject"]) for event in events if event["subject"] == UUID]


def test_events_come_as_they_happen(service, client):
    with service.client() as watcher:
        stream = watcher.events(timeout=5)
        client.get("/v1/version")
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
        first, second = next(stream), next(stream)
    assert [first["action"], second["action"]] == ["add", "bind"]
    assert second["seq"] == first["seq"] + 1
    assert first["env"] == {"MODALIAS": "demo:c01", "MDEV_TYPE": "demo-small", "MDEV_PARENT": "demo0"}
    assert second["env"]["DRIVER"] == "demo_drv"


def test_a_reader_goes_on_where_it_was(service, client):
    client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
    client.delete(f"/v1/devices/{UUID}")
    everything = list(service.client().events(after=0, timeout=0.2))
    assert [event["seq"] for event in everything] == list(range(1, len(everything) + 1))
    assert brief(everything) == [("add", UUID), ("bind", UUID), ("unbind", UUID), ("remove", UUID)]
    assert list(service.client().events(after=everything[2]["seq"], timeout=0.2)) == everything[3:]


def test_numbers_go_on_over_a_restart_of_the_service_and_nothing_is_lost(service, client):
    client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
    before = list(service.client().events(after=0, timeout=0.2))
    service.kill_service()
    service.start()
    with service.client() as again:
        again.delete(f"/v1/devices/{UUID}")
    after = list(service.client().events(after=0, timeout=0.2))
    assert after[: len(before)] == before
    assert [event["seq"] for event in after] == list(range(1, len(after) + 1))
    assert brief(after[len(before) :]) == [("unbind", UUID), ("remove", UUID)]


def test_what_happened_while_no_service_ran_is_told_by_the_next(service, client):
    """A removal the host finishes after the service has died."""
    client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "attributes": {"note": "x"}})
    client.put(f"/v1/devices/{UUID}/attributes/client", {"value": "pid 4711"})
    position = list(service.client().events(after=0, timeout=0.2))[-1]["seq"]
    slow = service.client()
    slow._send("POST", f"/v1/devices/{UUID}/unbind", {"timeout": 0.3, "force": True}, {})
    service.kill_service()
    service.start()
    seen = brief(service.client().events(after=position, timeout=1.0))
    assert seen in ([("unbind", UUID)], [])
    state = service.client().get(f"/v1/devices/{UUID}")["state"]
    assert state == ("unbound" if seen else "bound")


def test_a_reader_that_asks_for_what_is_gone_is_told_how_much(tmp_path):
    journal = Journal(tmp_path / "events.ndjson")
    for number in range(CAPACITY + 10):
        journal.emit("change", f"p{number}", {})
    assert next_line(journal, after=0) == b'{"lagged":10}\n'
    assert next_line(journal, after=10**9) == b'{"lagged":0}\n'


def test_a_journal_cut_short_loses_only_what_was_not_written(tmp_path):
    path = tmp_path / "events.ndjson"
    journal = Journal(path)
    for number in range(5):
        journal.emit("change", f"p{number}", {})
    journal.close()
    path.write_bytes(path.read_bytes()[:-7])
    again = Journal(path)
    assert again.last == 4
    again.emit("change", "next", {})
    assert Journal(path).last == 5


def test_the_journal_stays_small(tmp_path):
    path = tmp_path / "events.ndjson"
    journal = Journal(path)
    for _ in range(4 * CAPACITY):
        journal.emit("change", "p", {})
    assert len(path.read_bytes().splitlines()) <= 2 * CAPACITY + 1
    assert Journal(path).last == 4 * CAPACITY


@pytest.mark.parametrize("count", [3, CAPACITY + 5])
def test_a_journal_on_a_full_disk_goes_on_in_memory(tmp_path, count):
    folder = tmp_path / "gone"
    folder.mkdir()
    journal = Journal(folder / "events.ndjson")
    journal.close()
    (folder / "events.ndjson").unlink()
    folder.rmdir()
    for _ in range(count):
        journal.emit("change", "p", {})
    assert journal.last == count


def next_line(journal, after):
    """Return the first line a reader gets."""
    import asyncio

    async def first():
        stream = journal.follow(after)
        try:
            return await anext(stream)
        finally:
            await stream.aclose()

    return asyncio.run(first())
