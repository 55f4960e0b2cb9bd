"""Loads one plugin and prints, as JSON, what became of it: run by ``mdevkit plugins`` in a child process.

Usage: ``python -m mdevkit.probe GROUP NAME``.
"""

from __future__ import annotations

import contextlib
import json
import sys

from mdevkit.errors import MdevError
from mdevkit.plugins import Catalog, installed
from mdevkit.registry import Registry


def probe(group: str, name: str) -> dict[str, str]:
    """Load the plugin, check its contract, and return its status and reason."""
    catalog = Catalog(installed())
    plugin = next(plugin for plugin in catalog.plugins if (plugin.group, plugin.name) == (group, name))
    with Registry(catalog=catalog) as registry, contextlib.suppress(MdevError):
        registry.use(plugin)
    return {"status": str(plugin.status), "reason": plugin.reason}


if __name__ == "__main__":
    # What the plugin prints must not be taken for our answer.
    with contextlib.redirect_stdout(sys.stderr):
        answer = probe(*sys.argv[1:])
    sys.stdout.write(json.dumps(answer) + "\n")
