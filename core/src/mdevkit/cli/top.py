"""``mdevkit top``: devices, who uses them, how fast their counters grow, and what their hosts cost."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from mdevkit.cli.output import say, say_json, say_table, state
from mdevkit.client import Client

#: Device to the numbers of its counters by name.
Counters = dict[str, dict[str, list[int]]]

#: Clear the screen and go to its upper left corner (ECMA-48: ED, CUP).
_CLEAR = "\x1b[2J\x1b[H"


def command(
    delay: Annotated[float, typer.Option("--delay", "-d", min=0.1, metavar="SECONDS", help="Between two looks.")] = 1.0,
    times: Annotated[
        int, typer.Option("--times", "-n", min=0, metavar="N", help="How many looks; 0 until Ctrl-C on a terminal.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one look as JSON.")] = False,
) -> None:
    """Show hosts and devices, again and again on a terminal, twice otherwise."""
    with Client() as service:
        before = _look(service)
        if as_json:
            say_json({name: before[name] for name in ("hosts", "devices", "counters")})
            return
        left = times or (-1 if sys.stdout.isatty() else 1)
        while left:
            time.sleep(delay)  # load is what happens between two looks
            now = _look(service)
            if sys.stdout.isatty():
                sys.stdout.write(_CLEAR)
            _print(before, now)
            before, left = now, left - 1


def _look(service: Client) -> dict[str, Any]:
    look = {name: service.get(f"/v1/{name}") for name in ("hosts", "devices", "counters")}
    return look | {"time": time.monotonic()}


def _print(before: dict[str, Any], now: dict[str, Any]) -> None:
    spent = {(host["key"], host["pid"]): host["cpu"] for host in before["hosts"]}
    passed = now["time"] - before["time"]
    rows = []
    for host in now["hosts"]:
        load = max(0.0, host["cpu"] - spent.get((host["key"], host["pid"]), host["cpu"])) / passed
        memory = f"{host['memory'] / 2**20:.0f} MiB"
        rows.append([host["key"], host["pid"] or "-", state(host["state"]), f"{load:.0%}", memory, host["restarts"]])
    say_table(["HOST", "PID", "STATE", "CPU", "MEMORY", "RESTARTS"], rows)
    if now["devices"]:
        say()
    devices = [
        [
            device["uuid"],
            device["type"],
            state(device["state"]),
            device["driver"] or "-",
            (device["endpoint"] or {}).get("client") or "-",
            device["owner"] or "",
        ]
        for device in now["devices"]
    ]
    say_table(["DEVICE", "TYPE", "STATE", "DRIVER", "CLIENT", "OWNER"], devices)
    _print_rates(before["counters"], now["counters"], passed)


def _print_rates(before: Counters, now: Counters, passed: float) -> None:
    """Print how fast counters grow, those that do; of several queues also each one's."""
    rows = []
    for uuid, counters in now.items():
        for name, numbers in counters.items():
            # A device that was made again counts from the beginning.
            rates = [max(0, new - old) / passed for new, old in zip(numbers, before.get(uuid, {}).get(name, []), strict=False)]
            if any(rates):
                each = " ".join(f"{rate:.0f}" for rate in rates) if len(rates) > 1 else ""
                rows.append([uuid, name, f"{sum(rates):.0f}/s", sum(numbers), each])
    if rows:
        say()
    say_table(["DEVICE", "COUNTER", "RATE", "TOTAL", "EACH QUEUE"], rows)
