"""``mdevkit list``: the devices there are, and those that are defined. Columns and ``--dumpjson`` as mdevctl's."""

from __future__ import annotations

from typing import Annotated

import typer

from mdevkit.cli.listing import list_devices


def command(
    defined: Annotated[bool, typer.Option("--defined", "-d", help="The definitions instead of the devices there are.")] = False,
    tree: Annotated[bool, typer.Option("--tree", help="Parents, their types, and the devices of each.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Attributes, driver and endpoint too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dump: Annotated[bool, typer.Option("--dumpjson", help="Print JSON in mdevctl's shape.")] = False,
    uuid: Annotated[str | None, typer.Option("--uuid", "-u", metavar="UUID", help="Only this device.")] = None,
    parent: Annotated[str | None, typer.Option("--parent", "-p", metavar="PARENT", help="Only devices of this parent.")] = None,
) -> None:
    """List devices."""
    if tree + as_json + dump > 1:
        raise typer.BadParameter("--tree, --json and --dumpjson exclude one another")
    list_devices(defined=defined, tree=tree, verbose=verbose, as_json=as_json, dump=dump, uuid=uuid, parent=parent)
