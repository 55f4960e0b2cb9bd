"""A program for tests: ``mdevkit``, but its virtio devices log nothing of what they write, though they say so.

    python -P -m tests.guests.unlogged run TYPE ...

A live migration of what uses such a device loses what the device wrote; a test that cannot tell is worth nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from unittest import mock

from mdevkit.__main__ import main
from mdevkit_virtio.memory import DirtyLog
from mdevkit_virtio.model import VirtioModel


def _set_no_log(_model: VirtioModel, _log: DirtyLog | None, _rings: Collection[int] = ()) -> bool:
    return True


if __name__ == "__main__":
    with mock.patch.object(VirtioModel, "set_log", _set_no_log):
        sys.exit(main())
