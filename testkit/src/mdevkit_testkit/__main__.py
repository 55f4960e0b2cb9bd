"""``python -m mdevkit_testkit DIST``: checks an installed distribution; what ``mdevkit plugin check`` runs in a child process.

Exits with 0 when every check passed or was skipped, with 1 when one failed or a plugin cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import distribution, version

import pytest
from mdevkit import MdevError, Registry
from mdevkit.cli.output import say
from mdevkit.plugins import PARENTS, Catalog, Plugin, installed

from mdevkit_testkit.report import Reporter
from mdevkit_testkit.selection import VARIABLE, plugins_of
from mdevkit_testkit.watchdog import Watchdog


def main(arguments: list[str]) -> int:
    """Check, print what was found, and return the exit code."""
    options = _parser().parse_args(arguments)
    name = options.distribution
    say(f"{name} {distribution(name).version}, checked by mdevkit-testkit {version('mdevkit-testkit')}")
    loaded = [_load(plugin) for plugin in plugins_of(name)]
    if not all(loaded):
        return 1
    if not plugins_of(name, PARENTS):
        say(f"{name} brings no parent: there are no devices to check")
        return 0
    return _run(name, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mdevkit_testkit", description=__doc__)
    parser.add_argument("distribution", metavar="DIST", help="an installed distribution with mdevkit plugins")
    parser.add_argument("--only", metavar="WORDS", default="", help="only checks whose names match, as pytest's -k")
    parser.add_argument("--verbose", action="store_true", help="show every check, and all of a failure")
    parser.add_argument("--limit", metavar="SECONDS", type=float, default=60.0, help="the longest a check may take")
    return parser


def _load(wanted: Plugin) -> bool:
    """Load one plugin as a registry does, and say what became of it."""
    # The catalog of everything that is installed: it knows of names that two distributions claim.
    catalog = Catalog(installed())
    plugin = next(one for one in catalog.plugins if (one.entry, one.distribution) == (wanted.entry, wanted.distribution))
    try:
        with Registry(catalog=catalog) as registry:
            registry.use(plugin)
    except MdevError as error:
        say(f"  FAILED {error}")
        return False
    say(f"  plugin {plugin.name} ({plugin.group}) loads")
    return True


def _run(name: str, options: argparse.Namespace) -> int:
    os.environ |= {VARIABLE: name, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    reporter = Reporter(verbose=options.verbose)
    # Nothing of pytest's configuration, plugins or cache in or above the current folder has a say.
    settings = ["-c", os.devnull, "--rootdir", os.sep, "--noconftest", "-p", "no:cacheprovider", "-p", "no:terminal"]
    chosen = ["-k", options.only] if options.only else []
    targets = ["-p", "mdevkit_testkit.plugin", "--pyargs", "mdevkit_testkit.installed"]
    code = pytest.main([*settings, *chosen, *targets], plugins=[reporter, Watchdog(options.limit)])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and not reporter.failures:
        say(f"no check matches {options.only!r}")
        return 1
    reporter.summarize()
    return int(bool(code or reporter.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
