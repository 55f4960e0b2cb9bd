"""What shells are told when somebody presses Tab; bash itself is asked, zsh and fish through what their scripts call."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.services import Running, foreground

MDEVKIT = Path(sys.executable).with_name("mdevkit")
UUID = "6a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00d"


@pytest.fixture
def home(tmp_path):
    """A private home, and a runtime folder in which sockets fit."""
    with tempfile.TemporaryDirectory(prefix="mdk") as runtime:
        path = f"{MDEVKIT.parent}:{os.environ['PATH']}"
        yield {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": runtime, "PATH": path, "NO_COLOR": "1"}


@pytest.fixture
def complete(home):
    """Returns what bash is offered for a line with the cursor at its end."""

    def ask(line, **changes):
        words = line.split(" ")
        # The script joins its array with line breaks.
        asked = {"_MDEVKIT_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
        done = subprocess.run([MDEVKIT], capture_output=True, text=True, env={**home, **asked, **changes}, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.split()

    return ask


def bash(home, script):
    """Run a script in bash; not through exec, so that the program finds the shell it is for."""
    command = ["bash", "--norc", "-c", f"{script}; :"]
    done = subprocess.run(command, capture_output=True, text=True, env=home, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_subcommands_are_listed(complete):
    from mdevkit.cli import COMMANDS

    assert set(COMMANDS) <= set(complete("mdevkit "))
    assert sorted(complete("mdevkit plugin")) == ["plugin", "plugins"], "the first is a whole word, too"


def test_options_of_a_subcommand(complete):
    assert complete("mdevkit types --") == ["--parent", "--json", "--dumpjson", "--help"]


def test_types_come_from_the_installed_parents(complete):
    assert complete("mdevkit run mtty") == ["mtty-1", "mtty-2"]


def test_devices_in_the_foreground_by_uuid(complete, home):
    assert complete("mdevkit console ") == []
    command = [MDEVKIT, "run", "mtty-1", "--uuid", UUID]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=home) as device:
        try:
            assert any("serving" in line for line in device.stdout)
            assert complete("mdevkit console 6a2") == [UUID]
            assert complete("mdevkit attach 7") == []
        finally:
            device.terminate()


def test_types_and_devices_of_a_running_service(complete, tmp_path, home):
    running = Running(Path(home["XDG_RUNTIME_DIR"]), tmp_path)
    try:
        running.start()
        with running.client() as client:
            types = [type_["id"] for parent in client.get("/v1/parents") for type_ in parent["types"]]
            client.post("/v1/devices", {"type": types[0], "uuid": UUID})
        assert complete("mdevkit create ") == sorted(set(types))
        assert complete("mdevkit remove ") == [UUID]
    finally:
        running.clean_up()


def test_what_can_be_suspended_are_parents_and_devices(complete, tmp_path, home):
    assert complete("mdevkit suspend ") == []
    running = Running(Path(home["XDG_RUNTIME_DIR"]), tmp_path)
    try:
        running.start()
        with running.client() as client:
            client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
        assert complete("mdevkit suspend ") == complete("mdevkit resume ") == ["demo0", "demo1", "twin0", "twin1", UUID]
        assert complete("mdevkit suspend tw") == ["twin0", "twin1"]
        assert complete("mdevkit resume 6a2f") == [UUID]
    finally:
        running.clean_up()


@pytest.mark.parametrize("where", ["service", "foreground"])
def test_pktgen_is_offered_network_devices(complete, tmp_path, home, where):
    types = {"mtty-1": UUID, "mvnet_loopback-virtio": f"{UUID[:-1]}e", "mvnet_loopback-vhost": f"{UUID[:-1]}f"}
    plugins = "mdevkit-mvnet,mdevkit-virtio,mdevkit-mtty,mdevkit-vfio,mdevkit-service"
    running = Running(Path(home["XDG_RUNTIME_DIR"]), tmp_path)
    running.environment |= {"MDEVKIT_PLUGINS": plugins}
    with ExitStack() as stack:
        stack.callback(running.clean_up)
        if where == "service":
            with running.start().client() as client:
                for type_id, uuid in types.items():
                    client.post("/v1/devices", {"type": type_id, "uuid": uuid})
                client.post("/v1/devices", {"type": "mvnet_loopback-virtio", "bind": False})
        else:
            for type_id, uuid in types.items():
                stack.enter_context(foreground(running, uuid))(type_id)
        assert sorted(complete("mdevkit pktgen ")) == sorted([types["mvnet_loopback-virtio"], types["mvnet_loopback-vhost"]])
        assert complete(f"mdevkit pktgen {UUID}") == []


def test_a_tab_starts_no_service(complete, home):
    complete("mdevkit show ")
    complete("mdevkit create ")
    assert [path for path in Path(home["XDG_RUNTIME_DIR"]).rglob("*") if path.is_socket()] == []


def test_a_broken_plugin_does_not_spoil_the_line(complete, tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mdevkit.parents]\nbroken = broken:Broken\n[mdevkit.cli]\nshatter = broken:shatter\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')")
    assert complete("mdevkit create mtty", PYTHONPATH=str(tmp_path)) == ["mtty-1", "mtty-2"]
    assert complete("mdevkit ty", PYTHONPATH=str(tmp_path)) == ["types"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(home, shell):
    asked = {
        "_MDEVKIT_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "mdevkit ty",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run([MDEVKIT], capture_output=True, text=True, env={**home, **asked}, timeout=60, check=True)
    assert "types" in done.stdout
    assert "show" not in done.stdout


def test_the_script_works_in_bash(home):
    typed = "COMP_WORDS=(mdevkit con); COMP_CWORD=1"
    script = f'eval "$(mdevkit --show-completion)"; {typed}; _mdevkit_completion mdevkit; echo "$COMPREPLY"'
    assert bash(home, script) == "console\n"


def test_installing_it_writes_to_the_home_only(home):
    assert "bash completion installed" in bash(home, "mdevkit --install-completion")
    (script,) = Path(home["HOME"], ".bash_completions").iterdir()
    assert shlex.quote(str(script)) in Path(home["HOME"], ".bashrc").read_text().replace("'", "")


def test_help_tells_of_it_where_it_is(home):
    assert "--install-completion" in bash(home, "mdevkit --help")
    assert "--install-completion" not in bash(home, "mdevkit types --help")
