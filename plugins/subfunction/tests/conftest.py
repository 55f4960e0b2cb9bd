"""Helpers of the tests here."""

from __future__ import annotations

import pytest
from mdevkit import MdevError


@pytest.fixture
def fails():
    """Call something that must fail with an errno; returns the sentence."""

    def check(number, call, *args, **kwargs):
        with pytest.raises(MdevError) as caught:
            call(*args, **kwargs)
        assert caught.value.errno == number
        return caught.value.strerror

    return check
