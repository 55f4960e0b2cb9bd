"""``mdevkit buses``: the class buses."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.output import complain, say_json, say_table
from mdevkit.errors import MdevError
from mdevkit.plugins import BUSES
from mdevkit.registry import Registry


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the installed class buses and the class of their devices."""
    facts = []
    with Registry.discover() as registry:
        for plugin in registry.catalog.find(BUSES):
            try:
                bus = registry.bus(plugin.name)
            except MdevError as error:
                complain(error)
                continue
            device_class = f"{bus.device_class.__module__}.{bus.device_class.__qualname__}"
            facts.append({"name": bus.name, "device_class": device_class, "distribution": plugin.distribution})
    if as_json:
        say_json(facts)
    else:
        say_table(["BUS", "DEVICE CLASS", "DISTRIBUTION"], [list(fact.values()) for fact in facts])
