"""Notes of devices in the foreground, when others list devices, begin or end at the same moment."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading

import pytest
from mdevkit import running
from mdevkit.paths import runtime_dir
from mdevkit.running import announced

UUID = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch):
    made = tmp_path_factory.mktemp("r", numbered=True)
    made.chmod(0o700)
    monkeypatch.setenv("MDEVKIT_RUNTIME_DIR", str(made))
    return runtime_dir()


@pytest.fixture
def note(folder):
    """Where the note is; no file yet."""
    return folder / f"{UUID}.json"


@pytest.fixture
def at_flock(monkeypatch):
    """Has a function called after each flock of the code under test."""

    def install(hook):
        def flock(descriptor, how):
            fcntl.flock(descriptor, how)
            hook(descriptor, how)

        names = {name: getattr(fcntl, name) for name in dir(fcntl) if name.isupper()}
        monkeypatch.setattr(running, "fcntl", type("Fcntl", (), {**names, "flock": staticmethod(flock)}))

    return install


def facts():
    return {"uuid": UUID, "pid": os.getpid()}


def listed():
    return [found["uuid"] for found in running.running()]


def test_a_device_is_told_of_while_it_runs(folder):
    with announced(UUID, facts):
        assert running.running() == [facts()]
        assert running.find("1111") == facts()
    assert listed() == []
    assert list(folder.iterdir()) == []


def test_the_second_device_of_a_uuid(note, fails):
    with announced(UUID, facts):
        text = fails(errno.EEXIST, announced(UUID, facts).__enter__)
        assert text == f"a device {UUID} is running already"
        assert listed() == [UUID], "the first runs on"


@pytest.mark.parametrize("content", ["", "{}", '{"uuid": "old", "pid": 1}'])
def test_what_a_killed_process_left(folder, note, content):
    note.write_text(content)
    note.with_suffix(".now").touch()
    assert listed() == []
    assert list(folder.iterdir()) == []


def test_a_device_begins_while_a_listing_has_the_lock_of_a_stale_note(note):
    note.write_text("{}")
    with note.open() as listing:
        fcntl.flock(listing, fcntl.LOCK_SH | fcntl.LOCK_NB)
        threading.Timer(0.05, listing.close).start()
        with announced(UUID, facts):
            assert listed() == [UUID]


def test_a_device_begins_while_a_listing_removes_a_stale_note(note, at_flock):
    """The lock it gets in the end is that of a file that is no note any more."""
    note.write_text("{}")
    times = []

    def hook(descriptor, how):
        if how & fcntl.LOCK_EX and not times:
            times.append(how)
            note.unlink()

    at_flock(hook)
    with announced(UUID, facts):
        assert listed() == [UUID]


def test_the_slower_of_two_listings_leaves_the_device_that_has_begun_meanwhile(note, at_flock):
    note.write_text("{}")
    locked, go = threading.Event(), threading.Event()

    def hook(descriptor, how):
        if threading.current_thread().name == "slow" and not locked.is_set():
            locked.set()
            assert go.wait(20)

    at_flock(hook)
    slow = threading.Thread(target=running.running, name="slow")
    slow.start()
    assert locked.wait(20)
    assert listed() == [], "another listing is no device"
    with announced(UUID, facts):
        go.set()
        slow.join()
        assert listed() == [UUID]
        assert note.exists()


def test_the_note_of_the_next_device_stays_when_the_one_before_ends(note):
    """Somebody has removed the note of the first by hand."""
    with announced(UUID, facts):
        note.unlink()
        note.write_text("the next one's")
    assert note.exists()


def test_listings_and_devices_that_come_and_go(folder, note, thread):
    """However they fall together, each device is told of while it runs, and nobody is refused."""
    stop = threading.Event()

    def look():
        while not stop.is_set():
            assert listed() in ([], [UUID])

    lookers = [thread(look) for _ in range(4)]
    try:
        for _ in range(100):
            note.write_text(json.dumps({"uuid": UUID, "pid": 1}))
            with announced(UUID, facts):
                assert listed() == [UUID]
    finally:
        stop.set()
    for looker in lookers:
        looker.result(20)
    assert list(folder.iterdir()) == []
