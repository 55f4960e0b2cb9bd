"""``mdevkit plugin check DIST``: the conformance suite on an installed distribution, without a test of the vendor's own.

The suite is another package, and what it checks may hang or crash: it runs in a child process, and nothing of it or of the
distribution is imported here.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from typing import Annotated, Final

import typer

from mdevkit.cli.output import complain
from mdevkit.errors import MdevError
from mdevkit.plugins import GROUPS, Plugin, installed

#: The package of the suite, and the distribution that brings it.
TESTKIT: Final = "mdevkit_testkit"
TESTKIT_PACKAGE: Final = "mdevkit-testkit"

#: Variables that would change what pytest, which the suite is made of, does.
_FOREIGN: Final = frozenset({"PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_THEME"})


def check(
    distribution: Annotated[str, typer.Argument(metavar="DIST", help="An installed distribution, e.g. mdevkit-mtty.")],
    only: Annotated[str, typer.Option("--only", "-k", metavar="WORDS", help="Only checks whose names match, e.g. 'reset'.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every check, and all of a failure.")] = False,
) -> None:
    """Check an installed plugin against the contracts of mdevkit: life cycle, and the class of its devices."""
    plugins = _plugins_of(distribution)
    if find_spec(TESTKIT) is None:
        message = f"the conformance suite is not installed: pip install {TESTKIT_PACKAGE}"
        raise MdevError(errno.ENOPKG, message, TESTKIT_PACKAGE)
    command = [sys.executable, "-P", "-m", TESTKIT, plugins[0].distribution]
    command += ["--only", only] if only else []
    command += ["--verbose"] if verbose else []
    sys.stdout.flush()
    code = subprocess.run(command, env=_environment(), check=False).returncode
    if code < 0:
        complain(f"the check was ended by {signal.Signals(-code).name}; --verbose shows which check ran")
    if code:
        raise typer.Exit(1)


def _plugins_of(distribution: str) -> list[Plugin]:
    """Return a distribution's plugins: ENOENT when it is not installed or brings none."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import distribution as find

    plugins = installed()
    try:
        found = find(distribution)
    except (PackageNotFoundError, ValueError):
        known = ", ".join(sorted({plugin.distribution for plugin in plugins})) or "none"
        message = f"distribution {distribution!r} is not installed (with mdevkit plugins there are: {known})"
        raise MdevError(errno.ENOENT, message, distribution) from None
    own = [plugin for plugin in plugins if plugin.distribution == found.name]
    if not own:
        message = f"{found.name} {found.version} brings no mdevkit plugin: it has no entry point in {', '.join(GROUPS)}"
        raise MdevError(errno.ENOENT, message, distribution)
    return own


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}
