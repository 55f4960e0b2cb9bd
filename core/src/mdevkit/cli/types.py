"""``mdevkit types``: what can be created. Text and JSON as mdevctl's ``types`` prints them.

A running service is asked (`mdevkit.cli.quick`); here the installed parents are, when there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdevkit.cli.listing import list_types
from mdevkit.cli.output import complain, say_json
from mdevkit.hints import no_parents
from mdevkit.registry import Registry

if TYPE_CHECKING:
    from mdevkit.parent import MdevType


def command(
    parent: Annotated[str | None, typer.Option("--parent", "-p", metavar="PARENT", help="Only the types of this parent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", "--dumpjson", help="Print JSON.")] = False,
) -> None:
    """List the types of the installed parents, and how many more of each can be created."""
    with Registry.discover() as registry:
        parents = [registry.parent(parent)] if parent else registry.parents
        facts = [{"name": owner.name, "types": [_facts(type_) for type_ in owner.types.values()]} for owner in parents]
    if facts:
        list_types(facts, as_json=as_json)
    elif as_json:
        say_json([])
    else:
        complain(no_parents())


def _facts(type_: MdevType) -> dict[str, Any]:
    return {
        "id": type_.id,
        "available_instances": type_.available_instances,
        "device_api": type_.device_api,
        "name": type_.name,
        "description": type_.description,
    }
