"""``mdevkit types``: what can be created. Text and JSON as mdevctl's ``types`` prints them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdevkit.cli.output import complain, say, say_json
from mdevkit.hints import no_parents
from mdevkit.registry import Registry

if TYPE_CHECKING:
    from mdevkit.parent import MdevType, Parent


def command(
    parent: Annotated[str | None, typer.Option("--parent", "-p", help="Only the types of this parent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", "--dumpjson", help="Print JSON.")] = False,
) -> None:
    """List the types of the installed parents, and how many more of each can be created."""
    with Registry.discover() as registry:
        parents = [registry.parent(parent)] if parent else registry.parents
        if as_json:
            say_json([{owner.name: [{type_.id: _facts(type_)} for type_ in owner.types.values()]} for owner in parents])
        elif parents:
            _print(parents)
        else:
            complain(no_parents())


def _facts(type_: MdevType) -> dict[str, Any]:
    facts = {"available_instances": type_.available_instances, "device_api": type_.device_api}
    optional = {"name": type_.name, "description": type_.description}
    return facts | {key: value for key, value in optional.items() if value}


def _print(parents: list[Parent]) -> None:
    for parent in parents:
        say(parent.name)
        for type_ in parent.types.values():
            say(f"  {type_.id}")
            say(f"    Available instances: {type_.available_instances}")
            say(f"    Device API: {type_.device_api}")
            if type_.name:
                say(f"    Name: {type_.name}")
            if type_.description:
                say(f"    Description: {type_.description.replace(chr(10), ', ')}")
