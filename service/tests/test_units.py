"""The systemd units: what systemd says of them, and the service run as they have it: socket, command, capabilities."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from tests.services import wait_until

UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00c"
SYSTEM = ["--group", "daemon", "--host-user", "daemon", "--endpoint-owner", "nobody:daemon"]


def needs(program, package="systemd"):
    """Skip where a program is missing."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: apt-get install {package}")


@pytest.fixture
def install(service, tmp_path):
    """Writes the units and returns their texts."""

    def units(*words):
        done = service.mdevkit("service", "install", "--folder", tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path}/mdevkit.socket\n{tmp_path}/mdevkit.service\n"
        assert "enable --now mdevkit.socket" in done.stderr
        return [(tmp_path / f"mdevkit.{kind}").read_text() for kind in ("socket", "service")]

    return units


def setting(unit, name):
    """The value of a setting that is there once."""
    (value,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{name}=")]
    return value


def command(unit, socket):
    """The service's command line, with a socket of ours and without the system's definitions."""
    words = shlex.split(setting(unit, "ExecStart"))
    words[words.index("--socket") + 1] = str(socket)
    if "--definitions" in words:
        del words[words.index("--definitions") :][:2]
    return words


def test_install_writes_units_that_say_what_was_asked(install):
    socket, unit = install()
    assert setting(socket, "SocketMode") == "0600"
    assert "SocketGroup" not in socket
    for line in ("KillMode=process", "RuntimeDirectoryPreserve=yes", "NoNewPrivileges=yes", "Requires=mdevkit.socket"):
        assert line in unit.splitlines()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--group", "no-such-group"], "there is no group 'no-such-group'"),
        (["--host-user", "no-such-user"], "there is no user or group 'no-such-user'"),
        (["--folder", "/proc/x"], "the units cannot be written: /proc/x: "),
    ],
)
def test_what_cannot_be_installed_is_told(service, tmp_path, words, reason):
    done = service.mdevkit("service", "install", "--folder", tmp_path, *words)
    assert (done.returncode, done.stdout, reason in done.stderr) == (1, "", True), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], SYSTEM])
def test_units_are_what_systemd_accepts(install, tmp_path, words):
    needs("systemd-analyze")
    install(*words)
    done = subprocess.run(["systemd-analyze", "verify", *map(str, tmp_path.glob("mdevkit.*"))], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "mdevkit" in line] == []


def test_the_first_client_starts_the_service(service, install):
    needs("systemd-socket-activate")
    _, unit = install()
    service.runtime.mkdir(mode=0o700)
    passed = [f"--setenv={name}={value}" for name, value in service.environment.items() if name != "PATH"]
    with (service.runtime / "control.log").open("ab") as log:
        service.process = subprocess.Popen(
            ["systemd-socket-activate", f"--listen={service.socket}", *passed, *command(unit, service.socket)],
            stdout=log,
            stderr=log,
        )
    wait_until(service.socket.exists, what="the socket")
    created = service.mdevkit("create", "demo-small", "--uuid", UUID)
    assert (created.returncode, created.stdout) == (0, f"{UUID}\n"), created.stderr
    assert service.pid() == service.process.pid
    assert service.mdevkit("service", "stop").returncode == 0
    assert service.process.wait(10) == 0
    assert service.socket.is_socket(), "the socket is systemd's"
    assert list(service.hosts()) == ["demo0"], "the device goes on"
