"""``mdevkit parents``: the devices that can be divided."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.output import complain, say_json, say_table
from mdevkit.hints import no_parents
from mdevkit.registry import Registry


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the registered parents with their types and attributes."""
    with Registry.discover() as registry:
        facts = [
            {
                "name": parent.name,
                "driver": parent.driver_name,
                "types": list(parent.types),
                "attributes": parent.table.read_all(parent),
            }
            for parent in registry.parents
        ]
    if as_json:
        say_json(facts)
    elif facts:
        rows = [[fact["name"], fact["driver"], ", ".join(fact["types"])] for fact in facts]
        say_table(["PARENT", "DRIVER", "TYPES"], rows)
    else:
        complain(no_parents())
