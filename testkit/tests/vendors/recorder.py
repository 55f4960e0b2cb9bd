"""A pytest plugin for the runs over good and broken vendors: writes down what became of each test, and what was expected.

A test class with `fails` is a broken vendor: test name to a pattern the report of its failure has to match. Only those tests
of it are run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mdevkit_testkit import leaks
from mdevkit_testkit.suites.vfio import base
from mdevkit_testkit.suites.virtio import guest

# What these vendors leave behind will never go, and the signals they do not send will never come: no use in waiting long.
leaks.GRACE = 0.1
base.PATIENCE = guest.PATIENCE = 0.5

_results: dict[str, dict[str, Any]] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if not _fails(item) or item.originalname in _fails(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    for item in items:
        expected = _fails(item).get(item.originalname)
        _results[item.nodeid] = {"vendor": item.cls.__name__, "test": item.originalname, "expected": expected, "report": ""}


def _fails(item: Any) -> dict[str, str]:
    return getattr(item.cls, "fails", {})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    report = yield
    if report.failed:
        _results[report.nodeid]["report"] += str(report.longrepr)
    elif report.skipped:
        _results[report.nodeid]["skipped"] = str(report.longrepr)
    return report


def pytest_sessionfinish() -> None:
    Path(os.environ["RECORD"]).write_text(json.dumps(list(_results.values())))
