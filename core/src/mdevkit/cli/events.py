"""``mdevkit events``: what happens, as it happens."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Annotated, Any

import typer

from mdevkit.cli.output import say
from mdevkit.client import Client


def command(
    after: Annotated[
        int | None, typer.Option(metavar="SEQ", min=0, help="Begin after this event; with the next by default.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="End when nothing has happened for so long.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Print events of parents and devices until Ctrl-C."""
    with Client() as service:
        for event in service.events(after, timeout):
            say(json.dumps(event) if as_json else _line(event, after))
            # Somebody may wait for it at the end of a pipe.
            sys.stdout.flush()


def _line(event: dict[str, Any], after: int | None) -> str:
    if "lagged" in event:
        # The service tells no number where there is no such event: it begins at the beginning then.
        ahead = f"(there is no event {after} yet, or the service has begun to count anew; these are all there are)"
        return f"({event['lagged']} events were lost)" if event["lagged"] else ahead
    when = datetime.fromtimestamp(event["time"]).astimezone().isoformat(timespec="milliseconds")
    variables = " ".join(f"{name}={value}" for name, value in event["env"].items())
    return f"{event['seq']} {when} {event['action']} {event['subject']} {variables}".rstrip()
