"""Makes the Debian roots of the tests and prints where they are: ``./dev guests``."""

from __future__ import annotations

import sys

from tests.guests.root import DPDK, GUEST, MANAGEMENT, RootError, make_root


def main() -> int:
    """Make those that are not there; 1 with the reason on stderr if that fails."""
    try:
        for recipe in (GUEST, MANAGEMENT, DPDK):
            sys.stdout.write(f"{make_root(recipe)}\n")
    except (RootError, OSError) as error:
        sys.stderr.write(f"guests: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
