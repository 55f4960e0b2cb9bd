"""Rules of a whole run: what CI skips, and which tests want the machine for themselves.

With MDEVKIT_REQUIRE_ALL set, as `.ci/run` does, any skip makes the run fail. Under `-n` (pytest-xdist) a test marked `alone`
waits until no other runs, and others wait for it: threads that poll, and guests under traffic, want a processor each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from pathlib import Path

import pytest


class _Turns:
    """Tests of one worker beside those of others. flock(2) on two files of this checkout, which every worker has."""

    def __init__(self, root: Path) -> None:
        self._queue = os.open(root / "conftest.py", os.O_RDONLY | os.O_CLOEXEC)
        self._machine = os.open(root / "pyproject.toml", os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        # Whoever waits for the machine holds up those who come later: a test that wants it alone would else never get it.
        flock(self._queue, LOCK_EX)
        flock(self._machine, LOCK_EX if alone else LOCK_SH)
        flock(self._queue, LOCK_UN)
        try:
            yield
        finally:
            flock(self._machine, LOCK_UN)


_turns = pytest.StashKey[_Turns]()


def pytest_configure(config: pytest.Config) -> None:
    """Name our marker."""
    config.addinivalue_line("markers", "alone: nothing runs beside this test, whatever -n says")
    if hasattr(config, "workerinput"):
        config.stash[_turns] = _Turns(config.rootpath)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Wait for the test's turn; its time limit does not run yet."""
    turns = item.config.stash.get(_turns, None)
    if turns is None:
        return (yield)
    with turns.taken(alone=item.get_closest_marker("alone") is not None):
        return (yield)


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
