"""``mdevkit attach UUID``: what a client must be told to use a device."""

from __future__ import annotations

import errno
import shlex
from typing import Annotated, Any

import typer

from mdevkit.cli.complete import devices
from mdevkit.cli.output import say, say_json
from mdevkit.cli.remote import attach_facts
from mdevkit.errors import MdevError
from mdevkit.running import find


def command(
    uuid: Annotated[
        str, typer.Argument(metavar="UUID", autocompletion=devices, help="The device, or a unique beginning of its UUID.")
    ],
    qemu: Annotated[bool, typer.Option("--qemu", help="Arguments for QEMU (the default).")] = False,
    dpdk: Annotated[bool, typer.Option("--dpdk", help="Arguments for a DPDK application.")] = False,
    libvirt: Annotated[bool, typer.Option("--libvirt", help="XML for a libvirt domain.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Print the exact arguments a hypervisor or application needs to use a running device."""
    if qemu + dpdk + libvirt + as_json > 1:
        raise typer.BadParameter("--qemu, --dpdk, --libvirt and --json exclude one another")
    facts = _facts(uuid)
    if as_json:
        say_json(facts)
        return
    client = "dpdk" if dpdk else "libvirt" if libvirt else "qemu"
    words = facts["attach"].get(client)
    if words is None:
        raise MdevError(errno.EOPNOTSUPP, f"{client} cannot use device {facts['uuid']} ({facts.get('kind', 'no endpoint')})", uuid)
    if libvirt:
        for line in words:
            say(line)
    else:
        say(shlex.join(words))


def _facts(uuid: str) -> dict[str, Any]:
    """Return the facts of a device in the foreground, or of one in the service: ENODEV, EINVAL."""
    try:
        return find(uuid)
    except MdevError as error:
        if error.errno != errno.ENODEV:
            raise
    return attach_facts(uuid)
