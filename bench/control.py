"""What the control plane costs, in ratios: this machine's speed drops out of them.

``python bench/control.py [DEVICES]`` starts a service of its own with the demo parents of the tests, and prints

* create and remove of a device against GET /v1/version, on one connection, beside few devices and beside many;
* the list of 10, 100 and 1,000 devices, and the slope per device;
* how long after a create its event arrives;
* ``mdevkit list``, ``types`` and ``show``, whole processes, against ``python -c pass``;
* where mdevctl 1.4 and FUSE are here (``./dev guests``): the same questions, and a start and a stop, put to mdevctl itself on the
  mounted tree, to mdevkit-mdevctl and to mdevkit, beside few devices and beside many.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mdevkit.client import Client

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.mdevctl import OURS, REAL, MissingError, World, check_fuse, find_program

PARENTS = Path(__file__).parents[1] / "tests" / "parents"
MDEVKIT = Path(sys.executable).with_name("mdevkit")


def timed(call, times):
    """Return the median of the seconds `call` takes."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def processes(commands, environment, rounds=15):
    """Return the fewest seconds each command took, run in turn."""
    best = dict.fromkeys(commands, float("inf"))
    with Path(os.devnull).open("wb") as nothing:
        for _ in range(rounds):
            for name, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, env=environment, check=True, stdout=nothing)
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def line(name, seconds, base, what):
    print(f"{name:32}{seconds * 1e6:10.0f} us {seconds / base:8.2f} x {what}")


def api(client, devices):
    client.post("/v1/devices", {"type": "demo-many"})
    version = timed(lambda: client.get("/v1/version"), 300)
    line("GET /v1/version", version, version, "itself")
    sizes = [10, devices // 10, devices]
    for size in sizes:
        have = len(client.get("/v1/devices"))
        for _ in range(size - have):
            client.post("/v1/devices", {"type": "demo-many"})
        extra = []
        create = timed(lambda extra=extra: extra.append(client.post("/v1/devices", {"type": "demo-many"})["uuid"]), 100)
        removal = timed(lambda extra=extra: client.delete(f"/v1/devices/{extra.pop()}"), 100)
        listing = timed(lambda: client.get("/v1/devices"), 5)
        again = timed(lambda: client.get("/v1/version"), 200)
        line(f"create beside {size}", create, again, "GET version")
        line(f"remove beside {size}", removal, again, "GET version")
        line(f"list of {size}", listing, again, f"GET version, {listing / size * 1e6:.1f} us a device")
    return version


def event_latency(client, watcher):
    stream = watcher.events(timeout=10)
    taken = []
    for _ in range(50):
        began = time.perf_counter()
        client.post("/v1/devices", {"type": "demo-many"})
        next(stream)
        taken.append(time.perf_counter() - began)
        next(stream)
    return statistics.median(taken)


def on_one_tree(folder, sizes):
    """Ask mdevctl and what takes its place the same, of the same devices."""
    uuid = "0a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00c"
    ours = find_program(OURS)
    with World(REAL, folder) as world:
        world.define(uuid, "demo0", "demo-small")
        for size in sizes:
            for _ in range(size - len(world.client.get("/v1/devices"))):
                world.client.post("/v1/devices", {"type": "demo-many"})
            commands = {}
            for what in ("list", "types"):
                commands |= {
                    f"mdevctl {what}": [*world.program, what],
                    f"mdevkit-mdevctl {what}": [*ours, what],
                    f"mdevkit {what}": [MDEVKIT, what],
                }
            best = processes(commands, world.environment, rounds=7)
            for name, seconds in best.items():
                line(f"{name} ({size})", seconds, best[f"mdevctl {name.split()[1]}"], "mdevctl")
            base = None
            for program in (world.program, ours):
                both = [[*program, "start", "-u", uuid], [*program, "stop", "-u", uuid]]
                seconds = timed(lambda both=both: [subprocess.run(each, env=world.environment, check=True) for each in both], 9)
                base = base or seconds
                line(f"{'mdevctl' if base is seconds else OURS} start+stop ({size})", seconds, base, "mdevctl")


def main():
    devices = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    # In memory, where systemd and XDG have the runtime folder.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "XDG_RUNTIME_DIR": folder,
            "MDEVKIT_DEFINITIONS": f"{folder}/definitions",
            "PYTHONPATH": str(PARENTS),
            "MDEVKIT_PLUGINS": "mdevkit-demo",
        }
        began = time.perf_counter()
        subprocess.run([MDEVKIT, "service", "start"], env=environment, check=True)
        print(f"start of the service, hosts and all: {time.perf_counter() - began:.2f} s")
        path = f"{folder}/mdevkit/control.sock"
        with Client(path, start=False) as client, Client(path, start=False) as watcher:
            try:
                commands = {
                    "python -c pass": [sys.executable, "-c", "pass"],
                    "mdevkit list": [MDEVKIT, "list"],
                    "mdevkit types": [MDEVKIT, "types"],
                    "mdevkit show": [MDEVKIT, "show", client.post("/v1/devices", {"type": "demo-many"})["uuid"]],
                }
                best = processes(commands, environment)
                for name, seconds in best.items():
                    line(name, seconds, best["python -c pass"], "python -c pass")
                version = api(client, devices)
                line("create until its event is read", event_latency(client, watcher), version, "GET version")
            finally:
                subprocess.run([MDEVKIT, "service", "stop", "--remove", "--force"], env=environment, check=True)

    try:
        check_fuse()
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            on_one_tree(Path(folder), [10, devices // 10, devices])
    except MissingError as error:
        print(f"without mdevctl: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
