"""How long commands take to start, in units of ``python -c pass``.

    python bench/startup.py

Whole processes, run in turn so that a change of the machine's speed meets all of them; the median of each is compared. What
must be there is printed beside it: ``--version`` 3 at most, ``types`` without a service 16 at most. Of the latter, what is
left without typer, stevedore and pluggy (measured as a process that only imports them) is our own share: less than 3.

Everything runs from bytecode, as an installed program does; the environment has no service and no plugins but those installed.
"""

from __future__ import annotations

import compileall
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MDEVKIT = Path(sys.executable).with_name("mdevkit")
ROUNDS = 41

PASS, LIBRARIES, VERSION, TYPES = "python -c pass", "typer, stevedore, pluggy", "mdevkit --version", "mdevkit types"
COMMANDS = {
    PASS: [sys.executable, "-c", "pass"],
    LIBRARIES: [sys.executable, "-c", "import typer, stevedore, pluggy"],
    VERSION: [str(MDEVKIT), "--version"],
    TYPES: [str(MDEVKIT), "types"],
}
GOALS = {VERSION: 3.0, TYPES: 16.0}


def environment(runtime: str) -> dict[str, str]:
    """Return ours, without what slows Python down and without a service."""
    dropped = {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONDEVMODE", "PYTHONWARNINGS"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("MDEVKIT_")}
    return kept | {"XDG_RUNTIME_DIR": runtime}


def measure(env: dict[str, str]) -> dict[str, list[float]]:
    """Run every command ROUNDS times, in turn, after one run of each that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def main() -> None:
    for sources in ("core/src", *(str(path.relative_to(ROOT)) for path in ROOT.glob("plugins/*/src"))):
        compileall.compile_dir(ROOT / sources, quiet=1)
    with tempfile.TemporaryDirectory() as runtime:
        taken = measure(environment(runtime))
    base = statistics.median(taken[PASS])
    print(f"{'':28}    ms  x pass  spread (medians of {ROUNDS} runs each; spread: ninth decile over first)")
    for name, runs in taken.items():
        deciles = statistics.quantiles(runs, n=10)
        median = statistics.median(runs)
        goal = f"  at most {GOALS[name]:.0f}" if name in GOALS else ""
        print(f"{name:28}{median * 1e3:6.1f}{median / base:8.2f}{deciles[-1] / deciles[0]:8.2f}{goal}")
    # Pairs of the same round, so that the difference of two large numbers is not lost in what the machine does meanwhile.
    own = statistics.median(types - libraries for types, libraries in zip(taken[TYPES], taken[LIBRARIES], strict=True))
    print(f"{'types, our own share':28}{own * 1e3:6.1f}{own / base:8.2f}          less than 3")


if __name__ == "__main__":
    main()
