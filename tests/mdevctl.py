"""Two programs in one world: mdevctl itself on the mounted tree, and what takes its place, on the same service and folders.

A `World` is a root for ``MDEVCTL_ENV_ROOT`` with definitions, scripts and the tree of sysfs over a service of its own with the demo
parents. What a test asserts it reads from files and from the service, never from the program under test alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from mdevkit.client import Client
from mdevkit.errors import MdevError

from tests.guests.root import MANAGEMENT, find_root, loader

ROOT = Path(__file__).parents[1]
OURS, REAL = "mdevkit-mdevctl", "mdevctl"

#: What every script does first: note how it was called, and read its options.
_SCRIPT = """#!/bin/sh
input=$(tr '\\0' '0')
printf '%s\\t%s\\t%s\\n' "${{0##*/}}" "$*" "$input" >>{log}
while getopts t:e:a:s:u:p: option; do case $option in
  t) T=$OPTARG ;; e) E=$OPTARG ;; a) A=$OPTARG ;; s) S=$OPTARG ;; u) U=$OPTARG ;; p) P=$OPTARG ;;
esac; done
{body}
"""


class MissingError(Exception):
    """Something is not here; the text says what, and which command gets it."""


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Call:
    """How a script was called."""

    script: str
    options: dict[str, str]
    #: What it read from stdin.
    input: str

    @property
    def step(self) -> tuple[str, str, str]:
        """Event, action, state."""
        return self.options["-e"], self.options["-a"], self.options["-s"]


def find_program(name: str, called: str | None = None) -> list[str]:
    """Return the command line of a program, run under the name `called`; MissingError."""
    if name == OURS:
        return [str(Path(sys.executable).with_name(OURS))]
    root = find_root(MANAGEMENT)
    if root is not None and (root / "usr/bin/mdevctl").exists():
        return [*loader(root, called or name), str(root / "usr/bin/mdevctl")]
    program = shutil.which(name)
    if program is None or not _is_new_enough(program):
        raise MissingError("mdevctl 1.4 is missing: ./dev guests, or on Debian 13: apt-get install mdevctl")
    return [program]


def _is_new_enough(program: str) -> bool:
    """mdevctl 1.3 was the first to read MDEVCTL_ENV_ROOT, 1.4 is what we compare with."""
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split()
    return len(words) > 1 and words[1].startswith("1.4")


def check_fuse() -> None:
    """Raise MissingError where nothing can be mounted."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MissingError("/dev/fuse is missing: modprobe fuse, and run tests where it is ours to use")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise MissingError("fusermount3 is missing: apt-get install fuse3")


def wait_until(true, what):
    """Poll for something nobody tells us of."""
    deadline = time.monotonic() + 20
    while not (found := true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen")
        time.sleep(0.02)
    return found


@contextmanager
def open_world(program: str, folder: Path) -> Iterator[World]:
    """Yield a `World` of a program; where something is missing the test is skipped with the command that gets it."""
    try:
        find_program(program)
        if program == REAL:
            check_fuse()
    except MissingError as error:
        pytest.skip(str(error))
    with World(program, folder) as world:
        yield world


class World:
    """Everything a program sees. Use as a context manager; `clean` between tests."""

    def __init__(self, program: str, folder: Path, plugins: str = "mdevkit-demo,mdevkit-service") -> None:
        self.name = program
        self.program = find_program(program)
        self.root = folder / "root"
        self.socket = folder / "run" / "control.sock"
        self.log = folder / "calls"
        self.service_definitions = folder / "definitions"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MDEVKIT_", "RUST_"))}
        self.environment = kept | {
            "MDEVKIT_SOCKET": str(self.socket),
            "MDEVKIT_DEFINITIONS": str(self.service_definitions),
            "MDEVKIT_PLUGINS": plugins,
            "PYTHONPATH": str(ROOT / "tests" / "parents"),
            "MDEVCTL_ENV_ROOT": str(self.root),
        }
        self.client: Client
        self._processes: list[subprocess.Popen[bytes]] = []

    # -- coming and going ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.socket.parent.mkdir(mode=0o700)
        try:
            self._start("mdevkit_service", "--socket", self.socket)
            self.client = wait_until(self._connected, "the service's start")
            if self.name == REAL:
                self._mount()
            self._make_folders()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _mount(self) -> None:
        tree = self.root / "sys"
        tree.mkdir(parents=True)
        self._start("mdevkit_service.sysfs", "--socket", self.socket, tree)
        wait_until(lambda: (tree / "class").exists(), "the mount")

    def _start(self, module: str, *arguments: object) -> None:
        with (self.socket.parent / f"{module}.log").open("ab") as log:
            command = [sys.executable, "-P", "-m", module, *map(str, arguments)]
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._processes.append(process)

    def _connected(self) -> Client | None:
        try:
            client = Client(self.socket, start=False)
        except MdevError:
            return None
        client.get("/v1/hosts")
        return client

    def __exit__(self, *_error: object) -> None:
        with suppress(AttributeError, MdevError):
            self.clean()  # a host that has devices would outlive the service
            self.client.close()
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()

    def clean(self) -> None:
        """Remove what a test has left."""
        for device in self.client.get("/v1/devices"):
            self.client.delete(f"/v1/devices/{device['uuid']}?force=1")
        self._make_folders()
        self.log.unlink(missing_ok=True)

    def _make_folders(self) -> None:
        for part in ("etc", "usr"):
            shutil.rmtree(self.root / part, ignore_errors=True)
        self.definitions.mkdir(parents=True)
        for kind in ("callouts", "notifiers"):
            (self.root / "usr/lib/mdevctl/scripts.d" / kind).mkdir(parents=True)

    @property
    def definitions(self) -> Path:
        """Where definitions are."""
        return self.root / "etc/mdevctl.d"

    # -- doing ---------------------------------------------------------------------------------------------------------

    def run(self, *words: object, program: list[str] | None = None) -> Result:
        """Run the program to its end."""
        command = [*(program or self.program), *map(str, words)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: object) -> str:
        """Run the program, which must succeed, and return what it printed."""
        result = self.run(*words)
        assert result.code == 0, result
        return result.out

    def fails(self, *words: object, saying: str = "", code: int = 1) -> str:
        """Run the program, which must fail, say this and print nothing; return all it said."""
        result = self.run(*words)
        assert result.code == code, result
        assert saying in result.err, result
        assert result.out == "", result
        assert ("Error: " if code == 1 else "error: ") in result.err, result
        return result.err

    def device(self, uuid: str, parent: str, type_id: str) -> None:
        """Have a running device, not made by the program."""
        self.client.post("/v1/devices", {"uuid": uuid, "parent": parent, "type": type_id})

    def devices(self) -> set[tuple[str, str, str]]:
        """Return the devices that run: UUID, parent, type."""
        return {(device["uuid"], device["parent"], device["type"]) for device in self.client.get("/v1/devices")}

    def attribute(self, uuid: str, name: str) -> str:
        """Return a running device's attribute."""
        return str(self.client.get(f"/v1/devices/{uuid}/attributes/{name}")["value"])

    def define(self, uuid: str, parent: str, type_id: str, start: str = "manual", attrs: object = ()) -> None:
        """Have a definition, not made by the program."""
        config = {"mdev_type": type_id, "start": start, "attrs": list(attrs)}
        (self.definitions / parent).mkdir(exist_ok=True)
        (self.definitions / parent / uuid).write_text(json.dumps(config, indent=2))

    def defined(self, uuid: str, parent: str) -> dict | None:
        """Return what a definition file says, None when there is none."""
        path = self.definitions / parent / uuid
        return json.loads(path.read_text()) if path.exists() else None

    # -- scripts -------------------------------------------------------------------------------------------------------

    def callout(self, name: str, body: str = "exit 0", folder: str = "usr/lib/mdevctl") -> Path:
        """Have a callout script; `body` finds its options in $T $E $A $S $U $P."""
        return self._script(self.root / folder / "scripts.d/callouts" / name, body)

    def notifier(self, name: str, body: str = "exit 0", folder: str = "usr/lib/mdevctl") -> Path:
        """Have a notifier script."""
        return self._script(self.root / folder / "scripts.d/notifiers" / name, body)

    def _script(self, path: Path, body: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_SCRIPT.format(log=self.log, body=body))
        path.chmod(0o755)
        return path

    def calls(self, *, capabilities: bool = False) -> list[Call]:
        """Return how scripts were called, in order; questions for capabilities only if wanted."""
        if not self.log.exists():
            return []
        calls = []
        for line in self.log.read_text().splitlines():
            script, options, text = line.split("\t")
            words = options.split()
            calls.append(Call(script, dict(zip(words[::2], words[1::2], strict=True)), text))
        return [call for call in calls if capabilities or call.options["-a"] != "capabilities"]

    def steps(self) -> list[str]:
        """Return the calls in short: ``script event action state``."""
        return [" ".join([call.script, *call.step]) for call in self.calls()]
