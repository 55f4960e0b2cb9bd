"""Every contract test can fail, and says what is wrong: the suites over good vendors, and over vendors that break one rule each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mdevkit_testkit import ParentSuite, VfioSuite, VirtioSuite

VENDORS = Path(__file__).parent / "vendors"
#: Some hundred broken vendors, most of which have to be waited for.
pytestmark = pytest.mark.timeout(400)
SUITES = (ParentSuite, VfioSuite, VirtioSuite)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What became of every test: vendor, test, expected (a pattern, for a broken vendor), report (of a failure), skipped."""
    record = tmp_path_factory.mktemp("vendors") / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", VENDORS, "-p", "no:cacheprovider"]
    files = ["good.py", "broken_parents.py", "broken_devices.py", "broken_serving.py", "broken_virtio.py"]
    environment = {**os.environ, "PYTHONPATH": str(VENDORS), "RECORD": str(record)}
    done = subprocess.run(
        [*command, "-p", "recorder", *files], cwd=VENDORS, env=environment, capture_output=True, text=True, check=False
    )
    assert record.exists(), done.stdout + done.stderr
    return json.loads(record.read_text())


def names(suite: type) -> set[str]:
    return {name for name in dir(suite) if name.startswith("test_")}


def test_vendors_that_keep_the_contracts_pass(results):
    failed = [result for result in results if result["expected"] is None and result["report"]]
    assert not failed, "\n".join(f"{result['vendor']} {result['test']}\n{result['report']}" for result in failed)


def test_good_vendors_leave_no_test_out(results):
    """Between them, the good vendors have every capability there is, and say so: nothing is skipped."""
    assert [result for result in results if "skipped" in result] == []
    assert {result["test"] for result in results if result["expected"] is None} == set().union(*map(names, SUITES))


def test_broken_vendors_fail_with_the_reason(results):
    broken = [result for result in results if result["expected"] is not None]
    wrong = [result for result in broken if not re.search(result["expected"], result["report"])]
    assert broken
    assert not wrong, "\n".join(f"{r['vendor']} {r['test']}: wanted {r['expected']!r}, got\n{r['report']}" for r in wrong)


@pytest.mark.parametrize("suite", SUITES)
def test_every_contract_is_broken_by_somebody(results, suite):
    broken = {result["test"] for result in results if result["expected"] is not None}
    assert names(suite) - broken == set()


@pytest.mark.parametrize("suite", SUITES)
def test_every_contract_is_stated(suite):
    unstated = [name for name in names(suite) if not (getattr(suite, name).__doc__ or "").startswith("Checks ")]
    assert unstated == []
