"""What ``mdevkit plugin check`` shows: one line for each type and contract, the reason of each failure, and a verdict.

Takes the place of pytest's own reporter, whose words are for people who write tests. Text of the checked plugin is escaped.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from mdevkit.cli.output import say


@dataclass
class Group:
    """The checks of one contract on one type."""

    title: str
    #: What became of each check: "passed", "failed", or why it was skipped.
    outcomes: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return a summary: the numbers, then the reasons of skips."""
        count = Counter(self.outcomes.values())
        failed, passed = count.pop("failed", 0), count.pop("passed", 0)
        parts = {"FAILED": failed, "passed": passed, "skipped": count.total()}
        summary = ", ".join(f"{number} {word}" for word, number in parts.items() if number)
        return [f"  {self.title}: {summary}", *(f"      {number} skipped: {reason}" for reason, number in count.items())]


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
        return sum(len(group.outcomes) for group in self._groups.values())

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
        """Note what became of a phase of a check. A check that passed may fail in its last phase, where leaks are found."""
        item = self._items[report.nodeid]
        outcomes = self._group(item).outcomes
        if report.skipped:
            outcomes[report.nodeid] = _skip_reason(report)
        elif report.failed and outcomes.get(report.nodeid) != "failed":
            outcomes[report.nodeid] = "failed"
            contract = " ".join((inspect.getdoc(getattr(item, "function", item)) or "").split("\n\n")[0].split())
            self.failures.append(Failure(_name(item), contract, _reason(report, verbose=self.verbose)))
        elif report.when == "call":
            outcomes[report.nodeid] = "passed"

    def _group(self, item: pytest.Item) -> Group:
        suite: Any = getattr(item, "cls", None)
        title = f"{suite.title} of {_parameter(item)}"
        return self._groups.setdefault(title, Group(title))

    def summarize(self) -> None:
        """Print everything, and the verdict last."""
        for group in self._groups.values():
            for line in group.lines():
                say(line)
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
