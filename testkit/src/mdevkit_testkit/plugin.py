"""What pytest loads with this distribution: the leak check as a fixture, and the suites' known gaps.

pytest imports this module before it has started anything, coverage included, so neither mdevkit nor a vendor may be
imported here; the suites import them when a vendor's test module does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mdevkit_testkit.leaks import Snapshot

pytest.register_assert_rewrite("mdevkit_testkit.suites")


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail the test if a descriptor, a mapping of a memory file, a thread or a child process is left after it.

    Other fixtures that make such things must be torn down before: let them depend on this one.
    """
    before = Snapshot.take()
    yield
    left = before.leaks()
    assert not left, f"left behind: {', '.join(left)}"


@pytest.fixture
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a runtime folder of the test's own, where devices make their sockets; the test fails if a file is left in it.

    Its path is short: one of a socket cannot have more than 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix="mdevkit-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    try:
        yield folder
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]
        assert not left, f"files left behind: {', '.join(left)}"
    finally:
        shutil.rmtree(folder)


def pytest_configure(config: pytest.Config) -> None:
    """Make known the marker by which suites say what a test is about."""
    config.addinivalue_line("markers", "mdevkit_needs(capability): a test of something not every device has")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of what a suite's class does not expect, and expect the failures it names in ``known_gaps``."""
    for suite in {suite for item in items if (suite := _suite_of(item)) is not None}:
        unknown = [name for name in suite.known_gaps if not hasattr(suite, name)]
        if unknown:
            raise pytest.UsageError(f"{suite.__qualname__}.known_gaps names {', '.join(unknown)}, which the suite does not have")
    unwanted = {item for item in items if _is_unexpected(item)}
    items[:] = [item for item in items if item not in unwanted]
    config.hook.pytest_deselected(items=list(unwanted))
    for item in items:
        reason = getattr(_suite_of(item), "known_gaps", {}).get(getattr(item, "originalname", item.name))
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _is_unexpected(item: pytest.Item) -> bool:
    expected = getattr(_suite_of(item), "expected", None)
    return expected is not None and any(mark.args[0] not in expected for mark in item.iter_markers("mdevkit_needs"))


def _suite_of(item: pytest.Item) -> Any:
    """Return the class of a suite's test, None for any other; told by its attribute, since suites may not be imported here."""
    cls = getattr(item, "cls", None)
    return cls if isinstance(getattr(cls, "known_gaps", None), Mapping) else None
