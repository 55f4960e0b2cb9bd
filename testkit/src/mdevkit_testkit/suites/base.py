"""What all suites share: a registry with nothing but the vendor's parents in it, and words for refusals.

A suite is a class a vendor subclasses in a test module. Its tests run once for each type of the vendor's parents, each with a
new registry, new parents and a leak check of its own; they call from pytest's thread unless they say otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mdevkit import Mdev, MdevError, MdevType, ParentOps, Registry
from mdevkit.errors import errno_name
from mdevkit.plugins import BUSES, DRIVERS, Catalog, Plugin, installed


@cache
def _buses_and_drivers() -> list[EntryPoint]:
    return [plugin.entry for plugin in installed() if plugin.group in {BUSES, DRIVERS}]


class Suite:
    """Base of the suites. A subclass states `factory`, and the rest where the defaults do not fit."""

    #: What the suite checks, for reports.
    title: ClassVar[str] = ""

    #: What the entry point in ``mdevkit.parents`` names: returns a new parent, or several.
    factory: ClassVar[Callable[[], ParentOps | Sequence[ParentOps]]]
    #: Create parameters every device is created with.
    params: ClassVar[Mapping[str, Any]] = {}
    #: The types to test, by id; all of them when none are named.
    types: ClassVar[Collection[str]] = ()
    #: How many devices of a type are alive at once at most, where a test would use all there are.
    most: ClassVar[int] = 32
    #: Tests known to fail, with the reason; they are reported as expected failures, and fail when they pass.
    known_gaps: ClassVar[Mapping[str, str]] = {}

    pytestmark: ClassVar[Sequence[pytest.MarkDecorator]] = [
        pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
        pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
    ]

    @classmethod
    def parents(cls) -> list[ParentOps]:
        """Return new parents, as a registry would make them from the entry point."""
        made = cls.factory()
        return [made] if isinstance(made, ParentOps) else list(made)

    @classmethod
    def make_registry(cls) -> Registry:
        """Return a registry with new parents, and every installed bus and driver at hand."""
        catalog = Catalog([Plugin(entry) for entry in _buses_and_drivers()])
        return Registry(cls.parents(), catalog=catalog, remove_timeout=1.0)

    @classmethod
    def wanted(cls, type_: MdevType) -> str:
        """Return why the suite is not for a type; "" when it is."""
        del type_
        return ""

    @classmethod
    def type_ids(cls) -> list[Any]:
        """Return the types to test, as parameters for pytest."""
        reasons = _reasons(cls.make_registry, cls.wanted)
        unknown = [type_id for type_id in cls.types if type_id not in reasons]
        if unknown:
            there = ", ".join(reasons)
            raise pytest.UsageError(f"{cls.__qualname__}.types names {', '.join(unknown)}, but there are {there}")
        return [
            pytest.param(type_id, marks=[pytest.mark.skip(reason=reasons[type_id])] if reasons[type_id] else [])
            for type_id in cls.types or reasons
        ]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests that ask for a `type_id` once for each type; called by pytest."""
        if "type_id" in metafunc.fixturenames:
            metafunc.parametrize("type_id", self.type_ids())

    @pytest.fixture
    def registry(self, no_leaks: None, runtime_folder: Path) -> Iterator[Registry]:
        """Return a registry of the test's own; the test fails if core had to log an error, or something is left behind."""
        del no_leaks, runtime_folder  # they look when the registry is closed
        with errors_logged() as errors, self.make_registry() as registry:
            yield registry
        assert not errors, f"logged as errors: {'; '.join(errors)}"

    @pytest.fixture
    def mdev_type(self, registry: Registry, type_id: str) -> MdevType:
        """Return the type under test."""
        return registry.type(type_id)

    def create(self, type_: MdevType, registry: Registry, **options: Any) -> Mdev:
        """Create an unbound device of `type_`; `options` as for ``Registry.create``."""
        options = dict[str, Any](bind=False, parent=type_.parent.name, params=self.params) | options
        return registry.create(type_.id, **options)

    def create_bound(self, type_: MdevType, registry: Registry) -> Mdev:
        """Create a device and let a driver bind it; skips where none is installed."""
        mdev = self.create(type_, registry)
        modalias, drivers = mdev.modalias, registry.catalog.drivers(mdev.bus, mdev.match)
        registry.remove(mdev.uuid)
        if not drivers:
            pytest.skip(f"no driver for {modalias} is installed")
        return self.create(type_, registry, bind=True)


@cache
def _reasons(make_registry: Callable[[], Registry], wanted: Callable[[MdevType], str]) -> dict[str, str]:
    """Return the types of a suite's parents, each with the reason why the suite is not for it; asked once for each suite."""
    with make_registry() as registry:
        return {type_.id: wanted(type_) for type_ in registry.types}


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Collect what is logged under ``mdevkit`` at level ERROR: failures that nobody could be told."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            messages.append(record.getMessage() + (f" ({error!r})" if error else ""))

    collector, logger = Collector(logging.ERROR), logging.getLogger("mdevkit")
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)


@contextmanager
def refused(doing: str, *errnos: int) -> Iterator[None]:
    """Expect an error with one of `errnos` (any errno when none is given), and one that a person can use.

    `doing` completes "... was not refused".
    """
    with tolerated(doing) as refusals:
        yield
    assert refusals, f"{doing} was not refused"
    error = refusals[0]
    wanted = " or ".join(map(errno_name, errnos))
    assert not errnos or error.errno in errnos, f"{doing} was refused with {errno_name(error.errno)} ({error}), not {wanted}"


@contextmanager
def tolerated(doing: str) -> Iterator[list[OSError]]:
    """Let the block fail with an OSError, which is in the list afterwards, and with nothing else.

    `doing` is the subject of "... raised".
    """
    refusals: list[OSError] = []
    try:
        yield refusals
    except OSError as error:
        check_error(error, doing)
        # Without its frames: what they refer to would live as long as the list.
        refusals.append(error.with_traceback(None))
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{doing} raised {type(error).__name__} ({error}), which is no OSError") from error


def check_error(error: OSError, doing: str) -> None:
    """Check that an error has an errno, is one line, and does not wrap a bug of the vendor's."""
    cause = error.__cause__
    assert cause is None or isinstance(cause, OSError), f"{doing} made the plugin raise {cause!r}, which is no OSError"
    assert error.errno, f"{doing} raised an error without errno: {error!r}"
    text = str(error)
    assert text, f"{doing} raised {errno_name(error.errno)} without a word of explanation"
    if isinstance(error, MdevError):
        assert "\n" not in text, f"{doing} raised an error that is not one line: {text!r}"
