"""kill -9 of the service, of hosts, of both, at random moments: nothing acknowledged is lost, nothing leaks."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from uuid import UUID

import pytest
from mdevkit.errors import MdevError

from tests.services import Running, wait_until

#: How many sequences, and operations in each; CI runs more than a developer wants to wait for.
_USUAL = ("10", "500") if os.environ.get("MDEVKIT_REQUIRE_ALL") else ("2", "120")
SEEDS = range(int(os.environ.get("MDEVKIT_KILL_SEEDS", _USUAL[0])))
OPERATIONS = int(os.environ.get("MDEVKIT_KILL_OPERATIONS", _USUAL[1]))
#: Sequences that run at the same time, each on a service of its own: most of its time each waits for a process to start.
AT_ONCE = 2 * (os.cpu_count() or 1)
#: Seconds everything gets to come to rest after a kill; hosts' back-off is 5 s at most.
REST = 30
PARENTS = ("demo0", "demo1", "twin0", "twin1")
#: One operation in so many is disturbed by a kill.
DISTURBED = 6


class Model:
    """What must be true: devices by UUID, each with the notes it may have; None where it may also be absent."""

    def __init__(self):
        self.notes = {}
        self.absent = set()

    def check(self, devices, note_of):
        """Compare with what there is, and learn what was uncertain."""
        there = {device["uuid"]: device for device in devices}
        assert set(there) <= set(self.notes), "a device nobody asked for"
        for uuid in list(self.notes):
            if uuid not in there:
                assert uuid in self.absent, f"{uuid} is lost"
                del self.notes[uuid]
            else:
                assert there[uuid]["state"] == "bound", there[uuid]
                note = note_of(uuid)
                assert note in self.notes[uuid], f"{uuid}: {note} is none of {self.notes[uuid]}"
                self.notes[uuid] = [note]
        self.absent.clear()


class Storm:
    """Operations on one service, with kills among them."""

    def __init__(self, service, seed):
        self.service = service
        self.random = random.Random(seed)
        self.model = Model()
        self.client = service.start().client()
        self.kills = {"service": 0, "host": 0, "both": 0}

    def run(self):
        for _ in range(OPERATIONS):
            operation = self.random.choice([self.create, self.create, self.remove, self.note])
            if self.random.randrange(DISTURBED):
                operation(calm=True)
            else:
                self.disturbed(operation)

    def disturbed(self, operation):
        """Kill something while the operation runs, then look whether everything is as it must be."""
        what = self.random.choice(list(self.kills))
        self.kills[what] += 1
        delay = self.random.random() * 0.004
        killer = threading.Thread(target=self.kill, args=(what, delay))
        killer.start()
        operation(calm=False)
        killer.join()
        if what != "host":
            self.service.process.wait()
            self.service.start()
            self.client = self.service.client()
        self.check()

    def kill(self, what, delay):
        """Kill after `delay` seconds, a moment somewhere in the operation."""
        key = self.random.choice(["demo0", "demo1", "twins"])
        pid = self.service.hosts().get(key)
        time.sleep(delay)
        if what != "host":
            self.service.process.kill()
        if what != "service" and pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def check(self):
        wait_until(self.settled, REST, what=f"rest ({self.service.log()[-2000:]})")
        self.model.check(self.devices(), lambda uuid: self.client.get(f"/v1/devices/{uuid}/attributes/note")["value"])

    def devices(self):
        return self.client.get("/v1/devices")

    def settled(self):
        """Whether every host runs and no device is on its way."""
        hosts = {host["state"] for host in self.client.get("/v1/hosts")}
        return hosts == {"running"} and {device["state"] for device in self.devices()} <= {"bound"}

    # -- operations: each tells the model what is certain afterwards, and what is not --

    def create(self, calm):
        uuid, note = str(UUID(int=self.random.getrandbits(128), version=4)), f"n{self.random.random()}"
        wish = {"type": "demo-small", "parent": self.random.choice(PARENTS), "uuid": uuid, "attributes": {"note": note}}
        self.model.notes[uuid] = [note]
        try:
            self.client.post("/v1/devices", wish)
        except MdevError as error:
            if error.name == "ENOSPC":
                del self.model.notes[uuid]
            else:
                self.uncertain(error, calm)
                self.model.absent.add(uuid)

    def remove(self, calm):
        if self.model.notes:
            uuid = self.random.choice(list(self.model.notes))
            try:
                self.client.delete(f"/v1/devices/{uuid}")
            except MdevError as error:
                self.uncertain(error, calm)
                self.model.absent.add(uuid)
            else:
                del self.model.notes[uuid]

    def note(self, calm):
        if self.model.notes:
            uuid, note = self.random.choice(list(self.model.notes)), f"n{self.random.random()}"
            try:
                self.client.put(f"/v1/devices/{uuid}/attributes/note", {"value": note})
            except MdevError as error:
                self.uncertain(error, calm)
                self.model.notes[uuid].append(note)
            else:
                self.model.notes[uuid] = [note]

    @staticmethod
    def uncertain(error, calm):
        """An operation may fail when something was killed, and only then."""
        if calm:
            raise error

    def finish(self):
        """Remove all, and see that all room is free again and nothing is left on disk."""
        for uuid in list(self.model.notes):
            self.client.delete(f"/v1/devices/{uuid}")
        for parent in self.client.get("/v1/parents"):
            room = {type_["id"]: type_["available_instances"] for type_ in parent["types"]}
            assert room["demo-small"] == 8, "an instance has leaked"
        self.service.stop()
        wait_until(lambda: not self.service.hosts(), what="the hosts' end")
        assert self.service.files() == []


def storm(seed, folder):
    """One sequence, from the start of a service to its end."""
    folder.chmod(0o700)
    service = Running(folder, folder)
    try:
        storm = Storm(service, seed)
        storm.run()
        storm.check()
        storm.finish()
    finally:
        service.clean_up()
    return storm.kills


@pytest.fixture(scope="module")
def storms(request, tmp_path_factory):
    """The sequences of all seeds that were asked for, under way."""
    seeds = [item.callspec.params["seed"] for item in request.session.items if item.module is request.module]
    pool = ThreadPoolExecutor(AT_ONCE)
    # pytest's own folders are too deep for a socket's path.
    yield {seed: pool.submit(storm, seed, tmp_path_factory.mktemp("s")) for seed in seeds}
    pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_acknowledged_is_lost_and_nothing_leaks(storms, seed):
    assert all(storms[seed].result().values()), "the sequence was too calm to show anything"
