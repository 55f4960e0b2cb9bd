"""Fixtures of the tests that cross distributions. What this machine lacks skips a test, with the command that gets it."""

from __future__ import annotations

import pytest

from tests.guests import Kit, MissingKitError, find_kit


@pytest.fixture(scope="session")
def kit() -> Kit:
    """What guests boot with; skips where there is none."""
    try:
        return find_kit()
    except MissingKitError as error:
        pytest.skip(str(error))
