from __future__ import annotations

import errno
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.names import parse_uuid

TEXT = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@settings(deadline=None)
@given(st.uuids(), st.booleans())
def test_any_uuid_in_either_case(uuid, upper):
    assert parse_uuid(str(uuid).upper() if upper else str(uuid)) == uuid
    assert parse_uuid(uuid) is uuid


WRONG = ["", "1", TEXT[:-1], TEXT + "0", TEXT + "\n", f" {TEXT}", f"{{{TEXT}}}", f"urn:uuid:{TEXT}", TEXT.replace("-", "")]


@pytest.mark.parametrize("text", [*WRONG, TEXT[:-1] + "g", None, 5, b"x"])
def test_anything_else_is_refused(text, fails):
    assert fails(errno.EINVAL, parse_uuid, text) == f"{text!r} is not a UUID (8-4-4-4-12 hex digits)"


def test_a_very_long_name_makes_a_short_error(fails):
    assert len(fails(errno.EINVAL, parse_uuid, "f" * 10_000_000)) < 150


def test_the_value_is_the_uuid():
    assert parse_uuid(TEXT) == UUID(TEXT)
