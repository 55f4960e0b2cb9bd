"""How fast our loopback is, against DPDK's own vhost backend in its place.

    python bench/loopback [--rounds N] [--seconds S] [--json FILE] [--chart FILE]

dpdk-testpmd is the traffic client, through a virtio_user port: 1,024 frames go round from its transmit to its receive queue, by
way of a backend that sends back what it gets. The backends take turns, in an order that is reversed each round, each
measurement in fresh processes: DPDK's vhost with testpmd forwarding, and `mdevkit run mvnet_loopback-vhost`. Rings have
1,024 descriptors, receive buffers are mergeable, everybody polls, the client has one processor and the backend another.

The two do not do the same work, and that is the point of a mediated loopback: DPDK's backend copies a frame from the
transmit buffer into a buffer of its own and from there into the receive buffer; ours copies it once. So the ratio compares
loopbacks, not vhost implementations; with small frames the number of copies matters least.

A round in which one of the processes got less than 0.93 of its processor is dropped and counted. What is told is the median of
the ratios of rounds, with a 95 % interval (bootstrap). The pure-Python engine takes part in every fourth round.
Goals: 1,500 bytes 2.0 or more; 64 bytes: the interval reaches 1.0. Exits with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from figures import HEADER, chart, line, summarize
from peers import Case, measure

CASES = [Case(packed, size) for packed in (False, True) for size in (64, 1500)]
PYTHON_EVERY = 4


def one_round(number: int, case: Case, seconds: float) -> dict[str, Any]:
    backends = ["dpdk", "c"][:: -1 if number % 2 else 1]
    if number % PYTHON_EVERY == 0:
        backends.append("python")
    return {backend: measure(backend, case, seconds) for backend in backends}


def met(summary: dict[str, Any], case: Case) -> bool:
    if "ratio" not in summary:
        return False
    return summary["interval"][1] >= 1.0 if case.size == 64 else summary["ratio"] >= 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    options = parser.parse_args()
    rounds: dict[Case, list[dict[str, Any]]] = {case: [] for case in CASES}
    for number in range(options.rounds):
        for case, found in rounds.items():
            found.append(one_round(number, case, options.seconds))
            told = ", ".join(f"{name} {s.rate / 1e6:.2f} ({s.share:.2f})" for name, s in found[-1].items())
            print(f"round {number + 1}, {case}: {told}", file=sys.stderr, flush=True)
    summaries = {case: summarize(str(case), found) for case, found in rounds.items()}
    print("\n".join([HEADER, *map(line, summaries.values())]))
    if options.json:
        options.json.write_text(json.dumps(list(summaries.values()), indent=1) + "\n")
    if options.chart:
        options.chart.write_text(chart(list(summaries.values())))
    missed = [str(case) for case, summary in summaries.items() if not met(summary, case)]
    if missed:
        sys.exit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
