"""``mdevkit service``: the resident service itself."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from mdevkit.cli.output import complain, say, say_json
from mdevkit.cli.remote import running_service
from mdevkit.client import Client, start_service
from mdevkit.errors import MdevError
from mdevkit.paths import control_socket

command = typer.Typer(help="Start, stop and look at the resident service.", no_args_is_help=True)

#: Seconds the service gets to end.
_END_LIMIT: Final = 15.0


@command.callback()
def _service() -> None:
    """Start, stop and look at the resident service. Commands that need it start it themselves."""


@command.command("start")
def start(
    group: Annotated[str | None, typer.Option(metavar="GROUP", help="As root: let this group's members use it.")] = None,
    definitions: Annotated[Path | None, typer.Option(metavar="DIR", help="Root of the definitions.")] = None,
    host_user: Annotated[str | None, typer.Option(metavar="USER", help="As root: whom device hosts run as.")] = None,
    endpoint_owner: Annotated[
        str | None, typer.Option(metavar="USER[:GROUP]", help="As root: who may attach to devices, e.g. libvirt-qemu:kvm.")
    ] = None,
    endpoint_mode: Annotated[str | None, typer.Option(metavar="OCTAL", help="As root: mode of devices' sockets; 0600.")] = None,
) -> None:
    """Start the service in the background, unless it runs. A command that has to start it again does so with these options."""
    given = {
        "--group": group,
        "--definitions": definitions and definitions.absolute(),
        "--host-user": host_user,
        "--endpoint-owner": endpoint_owner,
        "--endpoint-mode": endpoint_mode,
    }
    path = control_socket()
    options = [str(word) for pair in given.items() if pair[1] is not None for word in pair]
    try:
        Client(path, start=False).close()
    except MdevError as error:
        if error.errno != errno.ECONNREFUSED:
            raise
    else:
        if options and options != _remembered(path):
            message = f"the service runs at {path} already, with its own options: mdevkit service stop, then start; devices go on"
            raise MdevError(errno.EBUSY, message)
        say(f"the service runs at {path}")
        return
    start_service(path, options)
    # Not before it has found its hosts is it of use to anybody.
    with Client(path, start=False) as service:
        service.get("/v1/hosts")
    say(f"the service runs at {path}")


def _remembered(path: str) -> object:
    """Return with which options the service at `path` was started, as it has noted them; None when it had none."""
    try:
        return json.loads(Path(path).with_name("options.json").read_bytes())
    except (OSError, ValueError):
        return None


@command.command("stop")
def stop(
    remove: Annotated[bool, typer.Option("--remove", help="Remove all devices first; by default they go on.")] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="With --remove: close the connections of whoever uses them.")
    ] = False,
) -> None:
    """Stop the service. Devices go on with their hosts, and the next service finds them, unless they are removed."""
    path = control_socket()
    try:
        service = running_service() if remove else Client(path, start=False)
    except MdevError as error:
        if error.errno != errno.ECONNREFUSED:
            raise
        service = None
    if service is None:
        say(f"no service runs at {path}")
        return
    with service:
        pid = service.get("/v1/version")["pid"]
        left = 0 if remove else len(service.get("/v1/devices"))
        service.post("/v1/shutdown", {"remove_devices": remove, "force": force})
    _await_end(pid)
    if left:
        complain(f"devices that go on: {left} (mdevkit service stop --remove ends them too)")


def _await_end(pid: int) -> None:
    """Wait for a process that is not our child; ETIMEDOUT."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended = select.poll()
        ended.register(process, select.POLLIN)
        if not ended.poll(_END_LIMIT * 1000):
            raise MdevError(errno.ETIMEDOUT, f"the service (pid {pid}) has not ended within {_END_LIMIT:g} s", pid)
    finally:
        os.close(process)


@command.command("status")
def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell whether the service runs, and what it holds. Fails when none runs."""
    path = control_socket()
    with Client(path, start=False) as service:
        facts: dict[str, Any] = service.get("/v1/version") | {"socket": path}
        facts |= {"hosts": service.get("/v1/hosts"), "devices": len(service.get("/v1/devices"))}
    if as_json:
        say_json(facts)
        return
    for name in ("version", "pid", "socket", "definitions", "devices"):
        say(f"{name:12}{facts[name]}")
    _print_hosts(facts["hosts"])


def _print_hosts(hosts: list[dict[str, Any]]) -> None:
    for host in hosts:
        error = f": {host['error']}" if host["error"] else ""
        say(f"{'host':12}{host['key']} pid {host['pid'] or '-'} {host['state']}{error}")


@command.command("rescan")
def rescan() -> None:
    """Look for plugins that were installed, removed or mended. The service looks by itself when something is installed."""
    with Client(start=False) as service:
        hosts = service.post("/v1/rescan")
    _print_hosts(hosts)


@command.command("install")
def install(
    group: Annotated[str | None, typer.Option(metavar="GROUP", help="As root: let this group's members use it.")] = None,
    host_user: Annotated[str | None, typer.Option(metavar="USER", help="As root: whom device hosts run as.")] = None,
    endpoint_owner: Annotated[str | None, typer.Option(metavar="USER[:GROUP]", help="As root: who may attach to devices.")] = None,
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write the units.")] = None,
) -> None:
    """Write systemd units, so that systemd starts the service on first use: root's for the system, others' for themselves."""
    if find_spec("mdevkit_service") is None:
        raise MdevError(errno.ENOPKG, "the service is not installed (pip install 'mdevkit[service]')")
    options = {"--group": group, "--host-user": host_user, "--endpoint-owner": endpoint_owner, "--folder": folder}
    words = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-P", "-m", "mdevkit_service.units", *words], env=os.environ, check=False)
    if done.returncode:
        raise typer.Exit(1)
