"""``mdevkit port`` and ``mdevkit dev``: sub-functions in the shape of devlink, over the service.

The commands write attributes of the parent (`mdevkit_subfunction.attributes`); the state of a port is the existence of its
device, which they create and remove as ``mdevkit create`` and ``remove`` do. Errors are one line and the exit code.
"""

from __future__ import annotations

import errno
import json
from typing import Annotated, Any, Final

import typer
from mdevkit.cli.output import say, say_json
from mdevkit.client import Client
from mdevkit.errors import MdevError, shown

from mdevkit_subfunction import words
from mdevkit_subfunction.eswitch import LEGACY, SWITCHDEV

#: What devlink puts before the address of a PCI device.
_BUS: Final = "pci/"

port = typer.Typer(help="Sub-functions of a card, in devlink's shape.", no_args_is_help=True)
dev = typer.Typer(help="Cards that can be divided into sub-functions, in devlink's shape.", no_args_is_help=True)
function = typer.Typer(help="The function behind a port.", no_args_is_help=True)
eswitch = typer.Typer(help="The card's embedded switch.", no_args_is_help=True)
port.add_typer(function, name="function")
dev.add_typer(eswitch, name="eswitch")

Json = Annotated[bool, typer.Option("--json", "-j", help="Print devlink's JSON.")]
Words = Annotated[list[str] | None, typer.Argument(metavar="NAME VALUE...", help="Pairs of a name and its value.")]
Handle = Annotated[str, typer.Argument(metavar="PARENT/INDEX", help="The port, as `port show` names it.")]


@port.command("add")
def add(
    parent: Annotated[str, typer.Argument(metavar="PARENT", help="The card, as `mdevkit parents` names it.")],
    what: Annotated[
        list[str], typer.Argument(metavar="flavour virtio|mdev|mlx5 [name N] [uuid U] [sfnum N]", help="Flavour and number.")
    ],
    as_json: Json = False,
) -> None:
    """Take a slot for a sub-function: it is there, inactive, and can be configured."""
    name = _parent(parent)
    with Client() as service:
        before = set(_ports(service, name))
        _store(service, name, "port_add", " ".join(what))
        added = {index: facts for index, facts in _ports(service, name).items() if index not in before}
        _show({name: _wanted(added, words.pairs(what, words.PORT))}, as_json)


def _wanted(added: dict[str, Any], asked: dict[str, str]) -> dict[str, Any]:
    """Leave out ports that others have added in the same moment."""
    number = asked.get("sfnum")
    return {index: facts for index, facts in added.items() if number is None or facts["sfnum"] == int(number, 0)}


@port.command("del")
def delete(handle: Handle) -> None:
    """Give the slot of an inactive port back."""
    name, index = _port(handle)
    with Client() as service:
        _store(service, name, "port_del", index)


@port.command("show")
def show(
    handle: Annotated[str | None, typer.Argument(metavar="PARENT[/INDEX]", help="One card or port; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """Show ports, their functions and their representors' counts."""
    with Client() as service:
        if handle is None:
            _show({name: _ports(service, name) for name in _cards(service)}, as_json)
        elif _has_index(handle):
            name, index = _port(handle)
            found = _ports(service, name)
            if index not in found:
                raise MdevError(errno.ENODEV, f"{name} has no port {index}", handle)
            _show({name: {index: found[index]}}, as_json)
        else:
            _show({_parent(handle): _ports(service, _parent(handle))}, as_json)


@function.command("set")
def function_set(handle: Handle, what: Words = None) -> None:
    """Set the function's hw_addr, or its state: active creates the device, inactive removes it."""
    name, index = _port(handle)
    asked = words.pairs(what or (), ("hw_addr", "state"))
    if not asked:
        raise typer.BadParameter("hw_addr ADDRESS or state active|inactive is wanted")
    if asked.get("state") not in {None, "active", "inactive"}:
        raise MdevError(errno.EINVAL, f"state {shown(asked['state'])} is none of active, inactive")
    with Client() as service:
        if "hw_addr" in asked:
            _store(service, name, "port_function", f"{index} hw_addr {asked['hw_addr']}")
        if "state" in asked:
            _set_state(service, name, index, asked["state"])


def _set_state(service: Client, name: str, index: str, state: str) -> None:
    facts = _ports(service, name).get(index)
    if facts is None:
        raise MdevError(errno.ENODEV, f"{name} has no port {index}", name)
    if facts["function"]["state"] == state:
        return
    if state == "inactive":
        service.delete(f"/v1/devices/{facts['uuid']}")
    else:
        service.post("/v1/devices", _device_of(name, facts))


def _device_of(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the request for a port's device.

    It says all of the port: where the card's process has died and the device is made anew, the port comes with it as it was.
    """
    attributes = {"sfnum": str(facts["sfnum"]), "representor": facts["netdev"]}
    if any(bytes.fromhex(facts["function"]["hw_addr"].replace(":", ""))):
        attributes["hw_addr"] = facts["function"]["hw_addr"]
    return {"type": f"subfunction-{facts['flavour']}", "parent": name, "uuid": facts["uuid"], "attributes": attributes}


@eswitch.command("set")
def eswitch_set(
    parent: Annotated[str, typer.Argument(metavar="PARENT")],
    what: Annotated[list[str], typer.Argument(metavar=f"mode {LEGACY}|{SWITCHDEV}")],
) -> None:
    """Set the switch's mode: sub-functions exist in switchdev mode only."""
    asked = words.pairs(what, ("mode",))
    with Client() as service:
        _store(service, _parent(parent), "eswitch_mode", asked.get("mode", ""))


@eswitch.command("show")
def eswitch_show(parent: Annotated[str, typer.Argument(metavar="PARENT")], as_json: Json = False) -> None:
    """Show the switch's mode."""
    name = _parent(parent)
    with Client() as service:
        mode = service.get(f"/v1/parents/{name}/attributes/eswitch_mode")["value"]
    if as_json:
        say_json({"dev": {_BUS + name: {"mode": mode}}})
    else:
        say(f"{_BUS}{name}: mode {mode}")


def _parent(text: str) -> str:
    return text.removeprefix(_BUS)


def _has_index(handle: str) -> bool:
    return "/" in _parent(handle)


def _port(handle: str) -> tuple[str, str]:
    name, slash, index = _parent(handle).rpartition("/")
    if not name or not slash or not index.isdigit():
        raise MdevError(errno.EINVAL, f"{shown(handle)} does not name a port, as 0000:06:00.0/32768 does", handle)
    return name, index


def _store(service: Client, parent: str, attribute: str, value: str) -> None:
    service.put(f"/v1/parents/{parent}/attributes/{attribute}", {"value": value})


def _ports(service: Client, parent: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(service.get(f"/v1/parents/{parent}/attributes/ports")["value"])
    return found


def _cards(service: Client) -> list[str]:
    return [parent["name"] for parent in service.get("/v1/parents") if parent["driver"] == "subfunction"]


def _show(cards: dict[str, dict[str, Any]], as_json: bool) -> None:
    ports = {f"{_BUS}{name}/{index}": facts for name, found in cards.items() for index, facts in found.items()}
    if as_json:
        say_json({"port": ports})
        return
    for handle, facts in ports.items():
        say(f"{handle}: " + _line(facts, ("type", "netdev", "flavour", "controller", "pfnum", "sfnum", "uuid")))
        say("  function:")
        say("    " + _line(facts["function"], ("hw_addr", "state", "opstate")))
        say("  stats:")
        say("    " + _line(facts["stats"], tuple(facts["stats"])))


def _line(facts: dict[str, Any], names: tuple[str, ...]) -> str:
    return " ".join(f"{name} {facts[name]}" for name in names)
