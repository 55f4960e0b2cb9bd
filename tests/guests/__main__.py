"""Makes the Debian root of the guests and prints where it is: ``./dev guests``."""

from __future__ import annotations

import sys

from tests.guests.root import RootError, make_root


def main() -> int:
    """Make the root if there is none; 1 with the reason on stderr if that fails."""
    try:
        sys.stdout.write(f"{make_root()}\n")
    except (RootError, OSError) as error:
        sys.stderr.write(f"guests: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
