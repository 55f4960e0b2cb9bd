"""Runs the service for tests, wherever they are: private folders, the demo parents, and every process gone at the end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mdevkit.client import Client
from mdevkit.errors import MdevError

#: The folder to put on PYTHONPATH for the demo parents.
PARENTS = Path(__file__).parent / "parents"

#: What starts a program that heeds these signals, also where the tests run under nohup or in the background of a shell.
HEEDS_SIGNALS = (
    sys.executable,
    "-c",
    "import os, signal, sys; [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)];"
    "os.execv(sys.argv[1], sys.argv[1:])",
)


def wait_until(true, seconds=10.0, what="it"):
    """Poll for something nobody tells us of."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {seconds} s")
        time.sleep(0.01)
    return found


def alive(pid):
    """Whether a process runs; one that has only not been waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def interpreter(venv):
    """Make an environment in which the tests' parents are installed: a system's service does not look at PYTHONPATH.

    Other users must be able to run it, which they are not where root's Python is in root's home; FileNotFoundError says so.
    """
    minor = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    usable = [path for path in (Path(sys.executable).resolve(), Path("/usr/bin", minor)) if path.exists() and _reachable(path)]
    if not usable:
        raise FileNotFoundError(f"needs a Python {minor} that other users can run: apt-get install {minor}")
    packages = venv / "lib" / minor / "site-packages"
    packages.mkdir(parents=True)
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to(usable[0])
    (venv / "pyvenv.cfg").write_text(f"home = {usable[0].parent}\n")
    folders = [*site.getsitepackages(), str(PARENTS)]
    (packages / "all.pth").write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders))
    return str(venv / "bin" / "python")


def _reachable(path):
    """Whether everybody may go to a file."""
    return all(folder.stat().st_mode & 0o001 for folder in path.parents)


class Running:
    """The service under test. It is started by `start`, or by the first `client`."""

    def __init__(self, folder, tmp_path):
        self.folder = folder
        self.runtime = folder / "mdevkit"
        self.socket = self.runtime / "control.sock"
        self.definitions = tmp_path / "definitions"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MDEVKIT_")},
            "XDG_RUNTIME_DIR": str(folder),
            "MDEVKIT_DEFINITIONS": str(self.definitions),
            "PYTHONPATH": str(PARENTS),
            "MDEVKIT_PLUGINS": "mdevkit-demo",
        }
        self.arguments = []
        self.python = sys.executable
        #: A program that starts the service, with its arguments.
        self.prefix = []
        self.process = None
        self._clients = []

    def start(self, *arguments, wait=True):
        """Start a service process of our own and wait until it answers."""
        self.arguments = list(arguments) or self.arguments
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        with (self.runtime / "control.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, self.python, "-P", "-m", "mdevkit_service", "--socket", self.socket, *self.arguments],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            wait_until(self.answers, what=f"the service's start ({self.log()})")
        return self

    def answers(self):
        try:
            with Client(self.socket, start=False) as client:
                client.get("/v1/hosts")
        except MdevError:
            return False
        return True

    def client(self):
        client = Client(self.socket, start=False)
        self._clients.append(client)
        return client

    def log(self):
        with suppress(FileNotFoundError):
            return (self.runtime / "control.log").read_text()
        return ""

    def pid(self):
        with self.client() as client:
            return client.get("/v1/version")["pid"]

    def hosts(self):
        """Key to process id, by the locks."""
        found = {}
        for lock in (self.runtime / "hosts").glob("*.lock"):
            with suppress(FileNotFoundError), lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    pid, _, key = file.read().strip().partition(" ")
                    if pid:  # else it has just been locked
                        found[key] = int(pid)
        return found

    def kill_service(self):
        self.process.kill()
        self.process.wait()

    def kill_host(self, key):
        os.kill(self.hosts()[key], signal.SIGKILL)

    def stop(self):
        """End the service in order."""
        self.process.terminate()
        assert self.process.wait(15) == 0, self.log()

    def mdevkit(self, *words, **changes):
        """Run a command to its end."""
        return subprocess.run(
            [Path(sys.executable).with_name("mdevkit"), *words],
            capture_output=True,
            text=True,
            timeout=60,
            env={**self.environment, **changes},
            check=False,
        )

    def clean_up(self):
        for client in self._clients:
            client.close()
        pids = set(self.hosts().values())
        with suppress(MdevError):
            pids.add(self.pid())
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def files(self):
        """What is in the runtime folder, but for logs and what stays on purpose."""
        stay = {"definitions.json", "events.ndjson", "options.json", "service.lock"}
        return sorted(
            str(path.relative_to(self.runtime))
            for path in self.runtime.rglob("*")
            if not path.is_dir() and path.suffix != ".log" and path.name not in stay
        )


@contextmanager
def private_service(plugins):
    """A service with these plugins, not started yet; its runtime folder has a short name, since sockets live in it."""
    with tempfile.TemporaryDirectory(prefix="mdk") as folder:
        running = Running(Path(folder), Path(folder))
        running.environment |= {"MDEVKIT_PLUGINS": plugins, "TERM": "dumb"}
        try:
            yield running
        finally:
            running.clean_up()


@contextmanager
def foreground(service, uuid):
    """Lends a function that starts a device with ``mdevkit run`` and returns the process and the device's facts."""
    with ExitStack() as stack:

        def start(*words):
            command = [Path(sys.executable).with_name("mdevkit"), "run", *words, "--uuid", uuid, "--json"]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=service.environment))
            stack.callback(process.kill)
            return process, json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")

        yield start
