"""``mdevkit plugins``: what is installed, and whether it works.

Each plugin is imported in a child of its own with a time limit, so that one which hangs or exits is reported like any other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Final

import typer

from mdevkit.cli.output import say, say_json, say_table
from mdevkit.plugins import Catalog, Plugin, Status, installed

#: Seconds a plugin gets to be imported and to state what it has.
TIME_LIMIT: Final = 10.0


def command(
    no_check: Annotated[bool, typer.Option("--no-check", help="Import nothing; read metadata only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed plugins with distribution and version, and say why one cannot be used."""
    plugins = Catalog(installed()).plugins
    if not no_check:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(_check, plugins))
    facts = [
        {
            "group": plugin.group.removeprefix("mdevkit."),
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "status": str(plugin.status),
            "reason": plugin.reason,
        }
        for plugin in plugins
    ]
    if as_json:
        say_json(facts)
        return
    say_table(["GROUP", "NAME", "DISTRIBUTION", "VERSION", "STATUS"], [list(fact.values())[:-1] for fact in facts])
    for plugin in plugins:
        if plugin.reason:
            say(f"{plugin.name} ({plugin.distribution} {plugin.version}): {plugin.reason}")


def _check(plugin: Plugin) -> None:
    """Load one plugin in a child and take over what became of it."""
    if plugin.status is not Status.INSTALLED:
        return
    command = [sys.executable, "-P", "-m", "mdevkit.probe", plugin.group, plugin.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        plugin.fail(f"importing it took longer than {TIME_LIMIT:g} s")
    except (IndexError, ValueError):
        plugin.fail(f"importing it ended the process with exit code {done.returncode}")
    else:
        plugin.status, plugin.reason = Status(answer["status"]), answer["reason"]
