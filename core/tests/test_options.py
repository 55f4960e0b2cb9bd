"""Values of the command line that are checked or completed before anything else is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from mdevkit.cli.options import endpoint_path


@pytest.mark.parametrize(
    ("given", "means"),
    [
        (None, None),
        ("a.sock", "{here}/a.sock"),
        ("/tmp/a.sock", "/tmp/a.sock"),
        ("connect:a.sock", "connect:{here}/a.sock"),
        ("connect:/tmp/a:b", "connect:/tmp/a:b"),
        ("./a:b", "{here}/a:b"),
    ],
)
def test_a_sockets_path_is_made_absolute_after_its_word(given, means):
    assert endpoint_path(given) == (means and means.format(here=Path.cwd()))
