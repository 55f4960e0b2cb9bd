"""Suspend and resume over all hosts: what a registry does for its devices, the service does for its hosts.

Runs on the event loop's thread. Hosts know nothing of one another, so none has to wait for another's order; but a refusal in
one resumes the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from mdevkit_service.devices import Devices
    from mdevkit_service.hosts import Hosts
    from mdevkit_service.schema import Power
    from mdevkit_service.supervisor import HostProcess


async def suspend(hosts: Hosts, devices: Devices, power: Power) -> None:
    """Suspend a device, a parent with its devices, or everything; the error of a driver that refuses, when all is as before."""
    if power.device or power.parent:
        await _ask_one(hosts, devices, power, "suspend")
        return
    done: list[HostProcess] = []
    try:
        for host in hosts.running():
            await _change(host, "suspend")
            done.append(host)
    except MdevError:
        await _resume_all(done)
        raise


async def resume(hosts: Hosts, devices: Devices, power: Power) -> None:
    """Resume what is suspended; the first error, when everything has been tried."""
    if power.device or power.parent:
        await _ask_one(hosts, devices, power, "resume")
        return
    errors = await _resume_all(hosts.running())
    if errors:
        raise errors[0]


async def _ask_one(hosts: Hosts, devices: Devices, power: Power, op: str) -> None:
    if power.device:
        await devices.power(power.device, op)
        return
    assert power.parent is not None
    await _change(hosts.known(power.parent), op, parent=power.parent)


async def _change(host: HostProcess, op: str, **whom: Any) -> None:
    try:
        await host.call(op, **whom)
    finally:
        await host.note_suspended()


async def _resume_all(hosts: list[HostProcess]) -> list[MdevError]:
    errors = []
    for host in reversed(hosts):
        try:
            await _change(host, "resume")
        except MdevError as error:  # the others must come back all the same
            errors.append(error)
    return errors
