"""What commands do with output that cannot be written, that an encoding lacks letters for, and with arguments nobody can read."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.services import HEEDS_SIGNALS, foreground, private_service, wait_until

BIN = Path(sys.executable).parent
UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a0f1"
OTHER = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a0f2"
FULL = "cannot write to standard output: No space left on device"
CLOSED = "cannot write to standard output: Bad file descriptor"


@pytest.fixture(scope="module")
def running():
    """A service for all that leave it as it was."""
    with private_service("mdevkit-demo,mdevkit-service") as service:
        yield service.start()


@pytest.fixture
def service(running):
    with running.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "owner": "Jürgen"})
        client.put(f"/v1/definitions/{quote('pär')}/{OTHER}", {"mdev_type": "demo-small"})
        yield running
        for device in client.get("/v1/devices"):
            client.delete(f"/v1/devices/{device['uuid']}?force=1")
        for item in client.get("/v1/definitions"):
            client.delete(f"/v1/definitions/{quote(item['parent'])}/{item['uuid']}")


def command(service, *words, redirect="", **changes):
    """Run a command in bash, with its redirections, and return the exit code and what it prints."""
    environment = {name: value for name, value in service.environment.items() if name != "PYTHONUNBUFFERED"}
    script = ["bash", "-c", f'exec "$@" {redirect}', "bash", BIN / words[0], *words[1:]]
    return subprocess.run(script, capture_output=True, timeout=60, env={**environment, **changes}, check=False)


def devices(service):
    with service.client() as client:
        return sorted(device["uuid"] for device in client.get("/v1/devices"))


PRINTING = [
    "mdevkit types",
    "mdevkit list",
    "mdevkit list --json",
    f"mdevkit show {UUID}",
    "mdevkit plugins --no-check",
    "mdevkit events --after 0 --timeout 0.1",
    "mdevkit --help",
    "mdevkit types --help",
    "mdevkit-mdevctl list",
    "mdevkit-mdevctl types --dumpjson",
    "mdevkit-mdevctl --help",
]


# -- what cannot be written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", PRINTING)
@pytest.mark.parametrize(
    ("redirect", "unbuffered", "reason"),
    [(">/dev/full", "", FULL), (">/dev/full", "1", FULL), (">&-", "1", CLOSED), (">&- <&-", "", CLOSED)],
)
def test_output_that_cannot_be_written_is_told_in_one_line(service, line, redirect, unbuffered, reason):
    done = command(service, *line.split(), redirect=redirect, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert re.fullmatch(rf"(Error: )?{reason}( \[\w+\])?\n", done.stderr.decode()), done.stderr.decode()


def test_the_version_tells_it_too(service):
    for redirect, told in ((">/dev/full", f"{FULL} [ENOSPC]\n"), (">&-", f"{CLOSED} [EBADF]\n")):
        done = command(service, "mdevkit", "--version", redirect=redirect)
        assert (done.returncode, done.stderr.decode()) == (1, told)


def test_types_without_a_service_tell_it_too(service):
    with tempfile.TemporaryDirectory(prefix="mdk") as folder:
        done = command(service, "mdevkit", "types", redirect=">/dev/full", XDG_RUNTIME_DIR=folder)
    assert (done.returncode, done.stderr.decode()) == (1, f"{FULL} [ENOSPC]\n")


def test_a_pipe_nobody_reads_stays_quiet(service):
    for line in PRINTING:
        done = command(service, *line.split(), redirect="> >(exec <&-; sleep 0.2)")
        assert done.stderr == b"", line


@pytest.mark.parametrize(
    "words",
    [
        ["mdevkit", "create", "demo-small"],
        ["mdevkit", "create", "demo-small", "--json"],
        ["mdevkit", "start", "-p", "demo0", "-t", "demo-small"],
        ["mdevkit-mdevctl", "start", "-p", "demo0", "-t", "demo-small"],
    ],
)
def test_no_device_is_made_whose_uuid_nobody_will_see(service, words):
    done = command(service, *words, redirect=">&-")
    assert (done.returncode, CLOSED in done.stderr.decode()) == (1, True), done.stderr
    assert devices(service) == [UUID]
    done = command(service, *words, redirect=">/dev/full")
    assert done.returncode == 1
    (made,) = set(devices(service)) - {UUID}
    assert f"{FULL}; the UUID is {made}" in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("program", ["mdevkit", "mdevkit-mdevctl"])
def test_no_definition_is_made_whose_uuid_nobody_will_see(service, program):
    words = [program, "define", "-p", "demo0", "-t", "demo-small"]
    done = command(service, *words, redirect=">&-")
    assert (done.returncode, CLOSED in done.stderr.decode()) == (1, True), done.stderr
    with service.client() as client:
        assert [item["uuid"] for item in client.get("/v1/definitions")] == [OTHER]
        done = command(service, *words, redirect=">/dev/full")
        (made,) = {item["uuid"] for item in client.get("/v1/definitions")} - {OTHER}
    assert f"{FULL}; the UUID is {made}" in done.stderr.decode()


@pytest.mark.parametrize("redirect", [">/dev/full 2>/dev/full", "2>&-", ">&- 2>&- <&-"])
def test_without_standard_error_the_exit_code_tells(service, redirect):
    assert command(service, "mdevkit", "frobnicate", redirect=redirect).returncode == 2
    assert command(service, "mdevkit", "show", "0000", redirect=redirect).returncode == 1
    code = command(service, "mdevkit", "list", redirect=redirect).returncode
    assert code == (0 if redirect == "2>&-" else 1)


def test_a_console_into_a_full_disk(service):
    with private_service("mdevkit-mbochs,mdevkit-mtty,mdevkit-vfio,mdevkit-service") as mine, ExitStack() as stack:
        from mdevkit_vfio.client import VfioUserClient

        _, facts = stack.enter_context(foreground(mine, UUID))("mtty-1", "--set", "port0=pty")
        guest = stack.enter_context(VfioUserClient.connect(facts["socket"]))
        full = stack.enter_context(Path("/dev/full").open("w"))
        console = subprocess.Popen(
            [BIN / "mdevkit", "console", UUID], stdin=subprocess.PIPE, stdout=full, stderr=subprocess.PIPE, env=mine.environment
        )
        guest.region(0).write_int(0, 1, ord("x"))
        assert console.communicate(timeout=30)[1].decode() == f"{FULL} [ENOSPC]\n"
        assert console.returncode == 1


def test_events_reach_a_pipe_as_they_happen(service):
    environment = {name: value for name, value in service.environment.items() if name != "PYTHONUNBUFFERED"}
    with service.client() as client:
        last = [event["seq"] for event in client.events(0, 0)][-1]
    words = [*HEEDS_SIGNALS, BIN / "mdevkit", "events", "--after", str(last - 1), "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert select.select([process.stdout], [], [], 20)[0], "it waits for more before it writes"
            assert json.loads(process.stdout.readline())["seq"] == last
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 130


# -- encodings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("mdevkit list -d", f"{OTHER} pär demo-small manual\n"),
        ("mdevkit list -v", "  Owner: Jürgen\n"),
        ("mdevkit list --tree", " owner=Jürgen\n"),
        ("mdevkit top -n 1 -d 0.1", "  Jürgen\n"),
        ("mdevkit-mdevctl list -d", f"{OTHER} pär demo-small manual\n"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(service, line, text):
    plain = command(service, *line.split(), PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert text.encode("ascii", "backslashreplace") in plain.stdout
    assert text.encode() in command(service, *line.split(), PYTHONIOENCODING="utf-8").stdout


@pytest.mark.parametrize("line", ["mdevkit list -d --dumpjson", "mdevkit-mdevctl list -d --dumpjson"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_stays_json_in_every_encoding(service, line, encoding):
    done = command(service, *line.split(), PYTHONIOENCODING=encoding)
    assert list(json.loads(done.stdout)[0]) == ["pär"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["create", "demo-small", "--owner", b"J\xfcrgen"], r"'--owner': 'J\xfcrgen' is not UTF-8"),
        (["create", b"demo-\xff"], r"'TYPE': 'demo-\xff' is not UTF-8"),
        (["create", "demo-small", "--set", "note=a", "--set", b"speed=\xff"], r"'--set': 'speed=\xff' is not UTF-8"),
        (["create", "demo-small", "--socket", b"/tmp/\xff"], r"'--socket': '/tmp/\xff' is not UTF-8"),
        (["remove", UUID.encode() + b"\xff"], r"'UUID...': '" + UUID + r"\xff' is not UTF-8"),
        (["show", UUID.encode() + b"\xff"], r"'UUID': '" + UUID + r"\xff' is not UTF-8"),
        (["list", b"-p\xff"], r"'--parent' / '-p': '\xff' is not UTF-8"),
        (["define", "-u", UUID, "-p", b"\xff", "-t", "demo-small"], r"'--parent' / '-p': '\xff' is not UTF-8"),
        (["service", "start", "--group", b"\xff"], r"'--group': '\xff' is not UTF-8"),
    ],
)
def test_an_argument_that_is_not_utf8_is_named(service, words, told):
    done = command(service, "mdevkit", *words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert told in done.stderr.decode()
    assert devices(service) == [UUID]


def test_mdevctls_place_names_it_too(service):
    done = command(service, "mdevkit-mdevctl", "define", "-u", UUID, "-p", b"\xff", "-t", "demo-small")
    assert (done.returncode, done.stderr.decode().splitlines()[0]) == (
        2,
        r"error: invalid value '\xff' for '--parent <PARENT>': it is not UTF-8",
    )
    done = command(service, "mdevkit-mdevctl", "start-parent-mdevs", b"\xff")
    assert (done.returncode, done.stderr.decode().splitlines()[0]) == (2, r"error: '\xff' is not UTF-8")


@pytest.mark.parametrize("program", ["mdevkit", "mdevkit-mdevctl"])
def test_files_may_have_any_name(service, tmp_path, program):
    file = tmp_path / os.fsdecode(b"\xff.json")
    file.write_text(json.dumps({"mdev_type": "demo-small", "start": "manual", "attrs": []}))
    done = command(service, program, "define", "-u", UUID, "-p", "demo1", "--jsonfile", file)
    assert (done.returncode, done.stderr) == (0, b"")


# -- what else is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["service"], ["sysfs"]])
def test_the_help_for_no_subcommand_is_the_help_alone(service, words):
    done = command(service, "mdevkit", *words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == command(service, "mdevkit", *words, "--help").stdout


def test_a_service_that_hangs_up_is_told_of():
    """It has answered one request when it goes; the next finds the connection closed."""
    with tempfile.TemporaryDirectory(prefix="mdk") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "control.sock"
        listener.bind(str(path))
        listener.listen()

        def serve():
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                peer.shutdown(socket.SHUT_RD)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n" + b'[{"name":"demo"}]')
                peer.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        environment = {**os.environ, "MDEVKIT_SOCKET": str(path)}
        done = subprocess.run([BIN / "mdevkit", "suspend", "demo"], capture_output=True, env=environment, timeout=60, check=False)
        thread.join()
    assert (done.returncode, done.stderr.decode()) == (1, "the service went away: Broken pipe [EPIPE]\n")


def test_an_event_that_is_yet_to_come_is_no_loss(service):
    done = command(service, "mdevkit", "events", "--after", "99999", "--timeout", "0.1")
    first, second, *_ = done.stdout.decode().splitlines()
    assert first == "(there is no event 99999 yet, or the service has begun to count anew; these are all there are)"
    assert second.startswith("1 ")


def test_what_is_suspended_says_so(service):
    def lines(*words):
        return command(service, "mdevkit", "list", *words).stdout.decode().splitlines()

    assert "  State: bound" in lines("-v")
    assert f"    {UUID} bound demo_drv owner=Jürgen" in lines("--tree")
    with service.client() as client:
        client.post("/v1/suspend", {"parent": "demo0"})
        try:
            assert "  State: bound, suspended" in lines("-v")
            assert {"demo0 suspended", f"    {UUID} bound suspended demo_drv owner=Jürgen", "demo1"} <= set(lines("--tree"))
            assert lines() == [f"{UUID} demo0 demo-small manual"], "mdevctl's columns"
        finally:
            client.post("/v1/resume", {})


@pytest.mark.parametrize(
    ("command_name", "words"),
    [
        ("create", ["{TYPE}", "--parent PARENT", "--uuid UUID"]),
        ("run", ["--parent PARENT", "--uuid UUID"]),
        ("list", ["--parent PARENT", "--uuid UUID"]),
        ("types", ["--parent PARENT"]),
        ("define", ["--parent PARENT", "--uuid UUID"]),
        ("modify", ["--parent PARENT", "--uuid UUID", "--value VALUE", "--index N"]),
        ("start", ["--parent PARENT", "--uuid UUID"]),
        ("stop", ["--uuid UUID"]),
        ("apply", ["{FILE}"]),
        ("pktgen", ["{UUID}", "--count N", "--window N"]),
        ("top", ["--times N"]),
    ],
)
def test_help_names_what_is_wanted(service, command_name, words):
    shown = command(service, "mdevkit", command_name, "--help", MDEVKIT_PLUGINS="mdevkit-service,mdevkit-virtio").stdout.decode()
    for word in words:
        assert word in shown
    assert not re.search(r"<\w|\{[a-z]", shown), shown


@pytest.mark.parametrize("words", [["--type", ""], ["--type", "demo-small", "--parent", ""]])
def test_a_definition_needs_a_type_and_a_parent(service, words):
    done = command(service, "mdevkit", "define", "-u", UUID, *(["-p", "demo0"] if len(words) == 2 else []), *words)
    assert (done.returncode, "it is empty" in done.stderr.decode()) == (2, True), done.stderr


def test_mdevctls_place_wants_a_type_too(service):
    done = command(service, "mdevkit-mdevctl", "define", "-p", "demo0", "-t", "")
    assert (done.returncode, done.stderr) == (1, b"Error: No type specified\n")


def test_a_stored_definition_without_a_type_is_warned_of_in_words(service):
    file = service.definitions / "demo0" / UUID
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"mdev_type": "", "start": "manual"}')
    done = command(service, "mdevkit-mdevctl", "list", "-d")
    assert re.fullmatch(rf"WARN: .*/demo0/{UUID}: .*mdev_type .*\n", done.stderr.decode()), done.stderr


# -- devices in the foreground ---------------------------------------------------------------------------------------------


def test_a_device_in_the_foreground_is_ended_where_it_is(service):
    with foreground(service, OTHER) as run:
        process, _ = run("demo-small")
        told = f"device {OTHER} belongs to process {process.pid}, an mdevkit run, and is ended there (Ctrl-C) [EBUSY]\n"
        for words in (["remove", OTHER], ["remove", OTHER.upper()], ["stop", "-u", OTHER], ["suspend", OTHER], ["unbind", OTHER]):
            done = command(service, "mdevkit", *words)
            assert (done.returncode, done.stderr.decode()) == (1, told), words
        assert process.poll() is None
        # One of the service by the same name is the service's.
        with service.client() as client:
            client.post("/v1/devices", {"type": "demo-small", "uuid": OTHER})
        assert command(service, "mdevkit", "remove", OTHER).returncode == 0
        assert devices(service) == [UUID]


def test_without_a_service_nothing_is_started_to_remove_it(service):
    with private_service("mdevkit-demo,mdevkit-service") as mine, foreground(mine, OTHER) as run:
        process, _ = run("demo-small")
        done = command(mine, "mdevkit", "remove", OTHER[:7])
        assert f"device {OTHER} belongs to process {process.pid}, an mdevkit run" in done.stderr.decode()
        done = command(mine, "mdevkit", "remove", "0000")
        assert done.stderr == b"there is no device '0000' [ENODEV]\n"
        assert not mine.socket.exists()


def test_a_terminal_that_is_closed_ends_a_device_as_a_signal_does(service):
    master, slave = os.openpty()
    words = [*HEEDS_SIGNALS, shutil.which("setsid"), "--ctty", BIN / "mdevkit", "run", "demo-small", "--uuid", OTHER]
    process = subprocess.Popen(words, env=service.environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    note = service.runtime / f"{OTHER}.json"
    wait_until(lambda: note.exists() and note.read_text(), what="the device")
    wait_until(lambda: b"serving" in os.read(master, 4096), what="its announcement")
    os.close(master)
    assert process.wait(20) == 0
    assert [path.name for path in service.runtime.iterdir() if path.name.startswith(OTHER)] == []
