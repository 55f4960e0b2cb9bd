"""What ``mdevkit plugin check`` shows: one line for each type and contract, the reason of each failure, and a verdict.

Takes the place of pytest's own reporter, whose words are for people who write tests. Text of the checked plugin is escaped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from mdevkit.cli.output import say


@dataclass
class Group:
    """The checks of one contract on one type."""

    title: str
    outcomes: Counter[str] = field(default_factory=Counter)
    #: Reason of a skip, to how many checks it skipped.
    skipped: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """Return a summary."""
        words = {"failed": "FAILED", "passed": "passed", "skipped": "skipped"}
        counts = ", ".join(f"{self.outcomes[outcome]} {word}" for outcome, word in words.items() if self.outcomes[outcome])
        return f"{self.title}: {counts}"


@dataclass
class Failure:
    """A check that failed."""

    name: str
    #: The contract, as the test's docstring states it.
    contract: str
    reason: str


class Reporter:
    """A pytest plugin; called on pytest's thread."""

    def __init__(self, *, verbose: bool) -> None:
        self.verbose = verbose
        self.failures: list[Failure] = []
        self._groups: dict[str, Group] = {}
        self._items: dict[str, pytest.Item] = {}

    @property
    def checks(self) -> int:
        """How many checks were run or skipped."""
        return sum(sum(group.outcomes.values()) for group in self._groups.values())

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what there is to run."""
        self._items = {item.nodeid: item for item in session.items}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a suite that cannot even be made as a failure."""
        if report.failed:
            self.failures.append(Failure("the parents cannot be made", "", _reason(report, verbose=self.verbose)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell where we are."""
        if self.verbose:
            say(f"... {_name(self._items[nodeid])}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count: a check counts once, when it has failed, was skipped, or its last phase is over."""
        item = self._items[report.nodeid]
        group = self._group(item)
        if report.failed:
            group.outcomes["failed"] += 1
            contract = " ".join((getattr(item, "function", item).__doc__ or "").split())
            self.failures.append(Failure(_name(item), contract, _reason(report, verbose=self.verbose)))
        elif report.skipped:
            group.outcomes["skipped"] += 1
            group.skipped[_skip_reason(report)] += 1
        elif report.when == "call":
            group.outcomes["passed"] += 1

    def _group(self, item: pytest.Item) -> Group:
        suite: Any = getattr(item, "cls", None)
        title = f"{suite.title} of {_parameter(item)}"
        return self._groups.setdefault(title, Group(title))

    def summarize(self) -> None:
        """Print everything, and the verdict last."""
        for group in self._groups.values():
            say(f"  {group.line()}")
            for reason, count in group.skipped.items():
                say(f"      {count} skipped: {reason}")
        for failure in self.failures:
            say()
            say(f"FAILED {failure.name}")
            for line in [failure.contract, *failure.reason.splitlines()]:
                say(f"    {line}".rstrip())
        say()
        failed = f"{len(self.failures)} of {self.checks} checks failed"
        say(failed if self.failures else f"all {self.checks} checks passed or skipped")


def _name(item: pytest.Item) -> str:
    return f"{getattr(item, 'originalname', item.name)} [{_parameter(item)}]"


def _parameter(item: pytest.Item) -> str:
    callspec: Any = getattr(item, "callspec", None)
    return str(callspec.params["type_id"])


def _reason(report: pytest.CollectReport | pytest.TestReport, *, verbose: bool) -> str:
    """Return why something failed: the first sentence, or all pytest has to say."""
    details: Any = report.longrepr
    crash = getattr(details, "reprcrash", None)
    if verbose or crash is None:
        return str(details)
    message: str = crash.message.splitlines()[0]
    return message.removeprefix("AssertionError: ")


def _skip_reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
