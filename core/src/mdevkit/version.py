"""The version of core, in a module of its own so that asking for it imports nothing else."""

from __future__ import annotations

from typing import Final

#: As in pyproject.toml (a test holds them together).
VERSION: Final = "0.1.0"
