"""A snapshot sees what is left behind, says what it is, and waits for what is on its way out."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import threading
import time

import pytest
from mdevkit_testkit import Snapshot, leaks


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(leaks, "GRACE", 0.1)


@pytest.fixture
def before() -> Snapshot:
    return Snapshot.take()


def test_nothing_is_nothing(before):
    assert before.leaks() == []


def test_descriptor(before):
    fd = os.eventfd(0)
    try:
        assert before.leaks() == [f"descriptor {fd} (anon_inode:[eventfd])"]
    finally:
        os.close(fd)
    assert before.leaks() == []


def test_descriptor_that_took_the_number_of_another():
    first = os.eventfd(0)
    before = Snapshot.take()
    os.close(first)
    second = os.memfd_create("other")
    try:
        assert second == first
        assert before.leaks() == [f"descriptor {second} (/memfd:other (deleted))"]
    finally:
        os.close(second)


def test_mapping_whose_descriptor_is_closed(before):
    fd = os.memfd_create("memory")
    os.ftruncate(fd, mmap.PAGESIZE)
    mapping = mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED)
    os.close(fd)
    try:
        assert "1 mapping(s) of /memfd:memory" in before.leaks()
    finally:
        mapping.close()
    assert before.leaks() == []


def test_thread(before):
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="poller")
    thread.start()
    try:
        assert before.leaks() == ["thread 'poller'"]
    finally:
        end.set()
        thread.join()
    assert before.leaks() == []


def test_child_process_and_zombie(before):
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        assert f"child process {child.pid} (cat)" in before.leaks()
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert before.leaks() == [f"child process {child.pid} (cat)"], "nobody has waited for it"
    finally:
        child.wait()
    assert before.leaks() == []


def test_what_garbage_holds_is_collected(before):
    class Holder:
        def __init__(self):
            self.fd = os.eventfd(0)
            self.me = self

        def __del__(self):
            os.close(self.fd)

    Holder()
    assert before.leaks() == []


def test_thread_that_is_ending_is_waited_for(before, monkeypatch):
    monkeypatch.setattr(leaks, "GRACE", 5.0)
    thread = threading.Timer(0.2, lambda: None)
    thread.start()
    began = time.monotonic()
    assert before.leaks() == []
    assert time.monotonic() - began < 5


def test_every_kind_is_named_at_once(before):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        found = "; ".join(before.leaks())
        child.stdin.close()
    assert re.fullmatch(rf"descriptor \d+ \(pipe:\[\d+\]\); child process {child.pid} \(cat\)", found)
