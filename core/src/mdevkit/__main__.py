"""The ``mdevkit`` command. Answers ``--version`` before anything heavy is imported; everything else goes to `mdevkit.cli`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line and return the exit code: 0, 1 (the operation failed) or 2 (usage)."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from mdevkit.version import VERSION

        try:
            os.write(1, f"mdevkit {VERSION}\n".encode())
        except OSError as error:
            from mdevkit.cli.output import complain, unwritable
            from mdevkit.errors import MdevError

            if isinstance(lost := unwritable(error), MdevError):
                complain(f"{lost} [{lost.name}]")
            return 1
        return 0
    from mdevkit.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
