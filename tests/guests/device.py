"""Serves one device with ``mdevkit run`` in a process of its own, as a user would in a second terminal.

Blocking calls with a time limit, for one thread; the process ends with `close`, or with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.guests.kit import dies_with_us


class DeviceError(Exception):
    """``mdevkit run`` failed or did not become ready; the text is what it said."""


class Device:
    """A served device; a context manager that ends it. `settings` are its create parameters, by attribute name.

    `socket` is for a device that takes the place of another one that was served there. `module` is run instead of mdevkit.
    """

    def __init__(
        self,
        type_name: str,
        settings: dict[str, str] | None = None,
        *,
        socket: str | None = None,
        module: str = "mdevkit",
        timeout: float = 20,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mdevkit-device-")
        #: Where the device is served.
        self.socket = Path(socket or f"{self._folder.name}/device.sock")
        chosen = [f"--set={name}={value}" for name, value in (settings or {}).items()]
        command = [sys.executable, "-P", "-m", module, "run", type_name, "--json", "--socket", str(self.socket), *chosen]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        if module != "mdevkit":  # one of the tests' own
            environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(
            [*dies_with_us(), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        #: What the command has printed.
        self.output = ""
        #: What it says about the device: `uuid`, `socket`, `attach`, ...
        self.facts: dict[str, Any] = {}
        try:
            self._wait_ready(timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process that serves the device."""
        return self._process.pid

    @property
    def arguments(self) -> list[str]:
        """QEMU's arguments for this device."""
        return list(self.facts["attach"]["qemu"])

    def attach(self, client: str = "qemu") -> list[str]:
        """Return what ``mdevkit attach`` prints in another process for that client."""
        command = [sys.executable, "-P", "-m", "mdevkit", "attach", self.facts["uuid"], f"--{client}"]
        return shlex.split(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)

    @property
    def cpu_time(self) -> int:
        """Nanoseconds that all threads of the process have run."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)

    @property
    def description(self) -> dict[str, Any]:
        """What ``-device`` describes, for QMP's device_add."""
        description: dict[str, Any] = json.loads(self.arguments[1])
        return description

    @property
    def terminals(self) -> list[str]:
        """The pseudo-terminals of the device's ``pty`` ports, in the order of the ports."""
        return re.findall(r"/dev/pts/\d+", self.output)

    def kill(self) -> None:
        """Kill the process with SIGKILL, as a crash would; its socket stays in the file system until `close`."""
        self._process.kill()
        self._process.wait()

    def close(self) -> int:
        """End the command as Ctrl-C would, and return its exit status. May be called again."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self.output += self._process.communicate(timeout=10)[0].decode() if self._process.stdout else ""
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise DeviceError(f"`mdevkit run` did not end on SIGINT: {self.output}") from None
        finally:
            self._process.wait()
            self._folder.cleanup()
        return self._process.returncode

    def _wait_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while not self.facts:
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise DeviceError(f"`mdevkit run` did not become ready in {timeout} s: {self.output}")
            if not (data := os.read(descriptor, 65536)):
                raise DeviceError(f"`mdevkit run` ended with {self._process.wait()}: {self.output}")
            self.output += data.decode()
            with contextlib.suppress(json.JSONDecodeError):  # not all of it is there yet
                self.facts = json.loads(self.output)
