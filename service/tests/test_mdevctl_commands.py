"""mdevkit-mdevctl on the service's own definitions, and ``mdevkit define`` and its kind: what goes beyond mdevctl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mdevkit_service.callouts import Callout, Scripts
from mdevkit_service.definitions import Definition
from mdevkit_service.mdevctl import options

A, B = (f"0a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00{digit}" for digit in "ab")
P, Q, T, BIG = "demo0", "demo1", "demo-small", "demo-big"


@pytest.fixture
def commands(service):
    """A service with the commands that its package brings."""
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-demo,mdevkit-service"
    service.start()
    return service


@pytest.fixture
def mdevkit(commands):
    """Runs `mdevkit`, which must succeed, and returns what it prints."""

    def run(*words):
        done = commands.mdevkit(*map(str, words))
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    return run


@pytest.fixture
def fails(commands):
    """Runs `mdevkit`, which must fail with one line."""

    def run(*words, saying, code=1):
        done = commands.mdevkit(*map(str, words))
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done
        assert saying in done.stderr, done

    return run


@pytest.fixture
def mdevctl(commands):
    """Runs mdevkit-mdevctl."""

    def run(*words, **changes):
        program = Path(sys.executable).with_name("mdevkit-mdevctl")
        environment = {**commands.environment, **changes}
        return subprocess.run([program, *map(str, words)], env=environment, capture_output=True, text=True, timeout=60, check=False)

    return run


def stored(service, uuid, parent=P):
    path = service.definitions / parent / uuid
    return json.loads(path.read_text()) if path.exists() else None


# -- mdevkit-mdevctl without another root ----------------------------------------------------------------------------------


def test_definitions_are_the_services(commands, mdevctl):
    assert mdevctl("define", "-u", A, "-p", P, "-t", T).returncode == 0
    assert mdevctl("modify", "-u", A, "--addattr", "speed", "--value", "7").returncode == 0
    assert stored(commands, A) == {"mdev_type": T, "start": "manual", "attrs": [{"speed": "7"}]}
    assert mdevctl("define", "-u", A, "-p", P, "-t", T).stderr == f"Error: Device {A} on {P} already defined\n"
    assert mdevctl("list", "-dv").stdout == f'{A} {P} {T} manual\n  Attrs:\n    @{{0}}: {{"speed":"7"}}\n'
    assert mdevctl("start", "-u", A).returncode == 0
    assert mdevctl("list").stdout == f"{A} {P} {T} manual (defined)\n"
    assert mdevctl("undefine", "-u", A).returncode == 0
    assert stored(commands, A) is None


def test_the_service_starts_by_itself(service, mdevctl):
    service.stop()
    assert mdevctl("types", "-p", P).stdout.startswith("demo0\n  demo-big\n")


def test_why_a_start_failed_stays_on_view(commands, mdevctl):
    mdevctl("define", "-u", A, "-p", P, "-t", T)
    mdevctl("modify", "-u", A, "--addattr", "moody", "--value", "3")
    failed = mdevctl("start", "-u", A)
    assert failed.stderr == (
        f"Error: Failed to create mdev {A}, type {T} on {P}\n\nCaused by:\n"
        f"    Failed to write 3 to attribute moody: device {A} does not like 3 (os error 34)\n"
    )
    with commands.client() as client:
        assert "does not like 3" in client.get("/v1/definitions")[0]["error"]


def test_a_bad_file_is_named(commands, mdevctl):
    mdevctl("define", "-u", A, "-p", P, "-t", T)
    (commands.definitions / P / B).write_text("{oops")
    listed = mdevctl("list", "-d")
    assert (listed.returncode, listed.stdout) == (0, f"{A} {P} {T} manual\n")
    assert f"WARN: {commands.definitions / P / B}: invalid JSON" in listed.stderr
    assert mdevctl("start", "-u", B).stderr.startswith(f"Error: {commands.definitions / P / B}: invalid JSON")
    assert mdevctl("undefine", "-u", B).returncode == 0
    assert mdevctl("list", "-d").stderr == ""


def test_a_parent_is_no_path(commands, mdevctl, tmp_path):
    assert "is not the name of a parent" in mdevctl("define", "-u", A, "-p", "../x", "-t", T).stderr
    root = {"MDEVCTL_ENV_ROOT": str(tmp_path)}
    assert "is not the name of a parent" in mdevctl("define", "-u", A, "-p", "../x", "-t", T, **root).stderr
    assert list(tmp_path.rglob(A)) == []


def test_missing_folders_are_nothing_to_list(mdevctl, tmp_path):
    root = {"MDEVCTL_ENV_ROOT": str(tmp_path / "none")}
    listed = mdevctl("list", "-d", **root)
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "", "")


def test_two_who_modify_lose_nothing(commands):
    with commands.client() as client:
        client.put(f"/v1/definitions/{P}/{A}", {"mdev_type": T})
    program = Path(sys.executable).with_name("mdevkit-mdevctl")
    words = [program, "modify", "-u", A, "--addattr", "note", "--value"]
    running = [subprocess.Popen([*words, str(number)], env=commands.environment) for number in range(8)]
    assert [process.wait(60) for process in running] == [0] * 8
    assert sorted(attribute["note"] for attribute in stored(commands, A)["attrs"]) == sorted(map(str, range(8)))


# -- mdevkit ---------------------------------------------------------------------------------------------------------------


def test_define_start_stop_undefine(commands, mdevkit, fails):
    assert mdevkit("define", "-u", A.upper(), "-p", P, "-t", T, "--auto", "--owner", "me") == ""
    assert stored(commands, A) == {"mdev_type": T, "start": "auto", "attrs": [], "owner": "me"}
    made = mdevkit("define", "-p", Q, "-t", BIG).strip()
    assert stored(commands, made, Q)["mdev_type"] == BIG
    assert mdevkit("start", "-u", A, "--dry-run") == f"{T} can be started on {P}\n"
    assert mdevkit("start", "-u", A) == ""
    fails("start", "-u", A, saying="Device already exists [EEXIST]")
    assert mdevkit("start", "-u", A, "--ensure") == ""
    assert mdevkit("list") == f"{A} {P} {T} auto (defined)\n"
    assert mdevkit("stop", "-u", A) == ""
    fails("stop", "-u", A, saying=f"Device {A} is not an active mdev [ENODEV]")
    assert mdevkit("undefine", "-u", A) == ""
    fails("undefine", "-u", A, saying="No devices match the specified uuid [ENODEV]")


def test_errors_have_their_cause_in_the_same_line(fails, mdevkit):
    mdevkit("define", "-u", A, "-p", P, "-t", T)
    mdevkit("modify", "-u", A, "--addattr", "speed", "--value", "2000")
    fails("start", "-u", A, saying=f"Failed to create mdev {A}, type {T} on {P}: attribute speed: 2000 is not between 0 and 1000")
    fails("start", "-u", A, "--dry-run", saying="2000 is not between 0 and 1000 [EINVAL]")
    fails("define", "-p", P, "--jsonfile", "/nowhere", saying='Unable to read file "/nowhere": No such file or directory [ENOENT]')


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["define", "-t", T], "--uuid or --parent is wanted"),
        (["define", "-p", P, "-t", T, "--jsonfile", "f"], "--jsonfile and --type exclude each other"),
        (["define", "-u", "x"], "'x' is not a UUID"),
        (["modify", "-u", A], "nothing to change is given"),
        (["modify", "-u", A, "--addattr", "x"], "--addattr needs --value"),
        (["modify", "-u", A, "-a", "-m"], "--auto and --manual exclude each other"),
        (["modify", "-u", A, "-t", T, "--live"], "--type and --live exclude each other"),
        (["start"], "--uuid or --parent is wanted"),
        (["stop"], "Missing option '--uuid'"),
    ],
)
def test_usage(service, words, saying):
    """A mistake is found before any service is asked."""
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-service"
    done = service.mdevkit(*words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done
    assert saying in done.stderr


def test_the_type_alone_can_be_modified(commands, mdevkit):
    mdevkit("define", "-u", A, "-p", P, "-t", T)
    mdevkit("modify", "-u", A, "-t", BIG)
    assert stored(commands, A)["mdev_type"] == BIG


def test_live_without_a_script(commands, mdevkit, fails, tmp_path):
    mdevkit("define", "-u", A, "-p", P, "-t", T)
    mdevkit("start", "-u", A)
    mdevkit("modify", "-u", A, "--live", "--addattr", "speed", "--value", "5")
    assert stored(commands, A)["attrs"] == []
    mdevkit("modify", "-u", A, "--live", "--defined", "--addattr", "speed", "--value", "6")
    assert stored(commands, A)["attrs"] == [{"speed": "6"}]
    file = tmp_path / "config"
    file.write_text(json.dumps({"mdev_type": T, "start": "manual", "attrs": [{"speed": "7"}, {"note": "n"}]}))
    mdevkit("modify", "-u", A, "--live", "--jsonfile", file)
    with commands.client() as client:
        attributes = client.get(f"/v1/devices/{A}")["attributes"]
    assert (attributes["speed"], attributes["note"]) == ("7", "n")
    fails("modify", "-u", A, "--live", "--addattr", "speed", "--value", "x", saying="a whole number is wanted")
    fails("modify", "-u", A, "--live", "--auto", saying="'auto' cannot be changed on active mdev")
    file.write_text(json.dumps({"mdev_type": BIG, "start": "manual"}))
    fails("modify", "-u", A, "--live", "--jsonfile", file, saying="'type' cannot be changed on active mdev")


def test_apply_what_was_listed(commands, mdevkit, fails, tmp_path):
    mdevkit("define", "-u", A, "-p", P, "-t", T, "-a")
    mdevkit("define", "-u", B, "-p", Q, "-t", BIG)
    file = tmp_path / "devices.json"
    file.write_text(mdevkit("list", "--defined", "--dumpjson"))
    mdevkit("undefine", "-u", A)
    mdevkit("undefine", "-u", B)
    plan = f"define {A} {P}\ndefine {B} {Q}\nstart {A} {P}\n"
    assert mdevkit("apply", file, "--dry-run") == plan
    assert mdevkit("apply", file) == plan
    assert mdevkit("apply", file) == ""
    assert json.loads(mdevkit("apply", file, "--json")) == []
    file.write_text("[]")
    assert mdevkit("apply", file, "--prune") == f"stop {A} {P}\nundefine {A} {P}\nundefine {B} {Q}\n"
    file.write_text(json.dumps([{"uuid": A, "parent": P, "mdev_type": "nope", "start": "auto"}]))
    result = commands.mdevkit("apply", str(file))
    assert (result.returncode, result.stdout) == (1, f"define {A} {P}\nstart {A} {P}\n")
    assert f"{A}: there is no type 'nope'" in result.stderr


@pytest.mark.parametrize(
    ("content", "saying"), [("{oops", "invalid JSON"), ("5", "a list of definitions is wanted"), ("[[1]]", "a list of")]
)
def test_apply_a_file_that_is_wrong(fails, tmp_path, content, saying):
    file = tmp_path / "devices.json"
    file.write_text(content)
    fails("apply", file, saying=saying)
    fails("apply", tmp_path / "none", saying="cannot be read: No such file or directory [ENOENT]")


# -- scripts of whom -------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    """A callout script, and how often a device's commands have run it and warned of it."""
    folder = tmp_path / "scripts" / "callouts"
    folder.mkdir(parents=True)
    path, ran = folder / "x.sh", tmp_path / "ran"
    path.write_text(f"#!/bin/sh\necho >>{ran}\nexit 0\n")
    path.chmod(0o755)

    def run():
        warnings = []
        scripts = Scripts(str(tmp_path / "scripts"), str(tmp_path / "none"), warnings.append, warnings.append)
        Callout(scripts, Definition(P, A, T)).around("define", lambda: None)
        return ran.exists(), warnings

    return path, run


def test_a_script_of_ours_runs(script):
    assert script[1]() == (True, [])


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("folder", [False, True])
def test_a_script_others_can_write_does_not_run(script, mode, folder):
    path, run = script
    (path.parent if folder else path).chmod(mode)
    ran, warnings = run()
    assert not ran
    assert len(warnings) == 1
    assert "others can write it (chmod go-w)" in warnings[0]


@pytest.mark.skipif(
    os.geteuid() != 0, reason="giving files away needs root: sudo ./dev test service/tests/test_mdevctl_commands.py"
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_script_of_somebody_elses_does_not_run(script, folder):
    path, run = script
    os.chown(path.parent if folder else path, 12345, -1)
    ran, warnings = run()
    assert not ran
    assert "belongs to user 12345, neither to root nor to this user" in warnings[0]


def test_a_link_is_as_good_as_what_it_names(script, tmp_path):
    path, run = script
    other = tmp_path / "other.sh"
    path.rename(other)
    path.symlink_to(other)
    assert run()[0]
    other.unlink()
    assert run()[1] == [f"{path} is not run: No such file or directory"]


# -- the command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("1111", "invalid length: expected length 32 for simple format, found 4"),
        ("xx", "found `x` at 1"),
        (A[:-1] + "g", "found `g` at 36"),
        (f"urn:uuid:{A[:-1]}g", "found `g` at 45"),
        (A[:-1], "expected 8-4-4-4-12 hexadecimal digits"),
    ],
)
def test_uuids_that_are_wrong(text, saying):
    with pytest.raises(options.UsageError, match="invalid value") as caught:
        options.parse("mdevctl list", "list", ["-u", text])
    assert saying in str(caught.value)


def test_every_command_has_help():
    for name, command in options.COMMANDS.items():
        text = options.help_of(f"mdevctl {name}", name)
        assert all(f"--{option}" in text for option in command.options)
        assert (name in options.overview("mdevctl")) != command.hidden


def test_options_after_two_dashes_are_words():
    assert options.parse("mdevctl x", "start-parent-mdevs", ["--", "-p"]) == {"PARENT": "-p"}
    with pytest.raises(options.UsageError, match="unexpected argument '-p' found"):
        options.parse("mdevctl x", "list", ["--", "-p"])
    with pytest.raises(options.UsageError, match="unexpected value 'x' for '--defined' found"):
        options.parse("mdevctl x", "list", ["--defined=x"])
