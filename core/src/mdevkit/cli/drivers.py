"""``mdevkit drivers``: who can bind what. Reads metadata only: drivers are imported when a device needs them."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.output import say_json, say_table
from mdevkit.plugins import DRIVERS, Catalog, driver_line, installed


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the installed drivers, their bus and the module aliases they match."""
    facts = []
    for plugin in Catalog(installed()).find(DRIVERS):
        driver, bus, match = driver_line(plugin.name)
        facts.append({"name": driver, "bus": bus, "alias": f"{bus}:{match}*", "distribution": plugin.distribution})
    if as_json:
        say_json(facts)
    else:
        say_table(["DRIVER", "BUS", "ALIAS", "DISTRIBUTION"], [list(fact.values()) for fact in facts])
