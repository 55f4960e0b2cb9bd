"""What a piece of code has left behind in this process: descriptors, mappings of memory files, threads, child processes.

Read from /proc, so that what was made past Python's modules is seen too. Standard library only: it is imported when pytest
starts. Any thread may call; a snapshot is of the whole process, so nothing else should be at work meanwhile.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SELF = Path("/proc/self")

#: How long a thread or child that has been told to end may take, in seconds.
GRACE = 2.0


@dataclass(frozen=True)
class Snapshot:
    """What the process holds at one moment."""

    #: Number of each open descriptor, to what it is.
    descriptors: Mapping[int, str]
    #: How often each memory file (memfd) is mapped.
    mappings: Mapping[str, int]
    #: Kernel's id of each thread, to its name.
    threads: Mapping[int, str]
    #: Process id of each child, zombies included, to its command.
    children: Mapping[int, str]

    @classmethod
    def take(cls) -> Snapshot:
        """Look now."""
        return cls(_descriptors(), _mappings(), _threads(), _children())

    def leaks(self) -> list[str]:
        """Return a phrase for each thing that is there now and was not; waits up to `GRACE` seconds for it to go."""
        deadline = time.monotonic() + GRACE
        while found := self._compare(Snapshot.take()):
            if time.monotonic() > deadline:
                return found
            gc.collect()
            time.sleep(0.01)  # a thread that ends tells nobody when the kernel has let go of it
        return []

    def _compare(self, now: Snapshot) -> list[str]:
        files = [f"descriptor {fd} ({what})" for fd, what in now.descriptors.items() if self.descriptors.get(fd) != what]
        maps = [f"{more} mapping(s) of {name}" for name, more in (Counter(now.mappings) - Counter(self.mappings)).items()]
        threads = [f"thread {name!r}" for tid, name in now.threads.items() if tid not in self.threads]
        children = [f"child process {pid} ({command})" for pid, command in now.children.items() if pid not in self.children]
        return files + maps + threads + children


def _descriptors() -> dict[int, str]:
    found = {}
    for entry in (_SELF / "fd").iterdir():
        # The descriptor of this very listing is closed by now.
        with suppress(OSError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def _mappings() -> Counter[str]:
    lines = (_SELF / "maps").read_text().splitlines()
    return Counter(line.split(maxsplit=5)[5].removesuffix(" (deleted)") for line in lines if " /memfd:" in line)


def _threads() -> dict[int, str]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = {}
    for entry in (_SELF / "task").iterdir():
        with suppress(OSError):
            found[int(entry.name)] = names.get(int(entry.name)) or (entry / "comm").read_text().strip()
    return found


def _children() -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # "pid (command) state parent ...", where the command may hold anything.
                command, _, rest = (entry / "stat").read_text().partition(" (")[2].rpartition(") ")
                if int(rest.split()[1]) == os.getpid():
                    found[int(entry.name)] = command
    return found
