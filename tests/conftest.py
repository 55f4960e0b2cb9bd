"""Fixtures of the tests that cross distributions, and the rule that CI skips nothing.

A test that needs what this machine lacks is skipped with the command that gets it. With MDEVKIT_REQUIRE_ALL set, as
`.ci/run` does, any skip of the whole run makes it fail.
"""

from __future__ import annotations

import os

import pytest

from tests.guests import Kit, MissingKitError, find_kit


@pytest.fixture(scope="session")
def kit() -> Kit:
    """What guests boot with; skips where there is none."""
    try:
        return find_kit()
    except MissingKitError as error:
        pytest.skip(str(error))


def _forbidden_skips(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("MDEVKIT_REQUIRE_ALL") or reporter is None:
        return 0
    return len(reporter.stats.get("skipped", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that had to show everything and skipped something."""
    if _forbidden_skips(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say so."""
    if skipped := _forbidden_skips(config):
        terminalreporter.section("MDEVKIT_REQUIRE_ALL", red=True)
        terminalreporter.line(f"{skipped} skipped: here every test has to run, so this run fails", red=True)
