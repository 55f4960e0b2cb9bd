"""Sends frames over a link at a rate, and accounts for every one of them.

One thread, which never sleeps longer than until the next frame is due. Frames are bounded in flight, so that what is lost
was lost by the device and not by a queue of ours; frames that are out for longer than the timeout count as lost, and as late if
they come after all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from mdevkit_virtio.pktgen.frames import FrameMaker
from mdevkit_virtio.pktgen.latency import Histogram
from mdevkit_virtio.pktgen.link import Link

#: Most frames that are made and sent at once.
BURST: Final = 64
#: Seconds between two calls of `progress`.
PROGRESS_INTERVAL: Final = 0.5
_COUNTERS: Final = ("sent", "received", "lost", "corrupt", "reordered", "late", "duplicate", "foreign")
_PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}


@dataclass(frozen=True)
class Plan:
    """What to send: `count` frames or for `seconds`, whichever ends first (0: no limit), `rate` in a second (0: all it can).

    `window` is how many frames may be in flight; `timeout` how many seconds a frame may take before it is lost.
    """

    count: int = 10_000
    seconds: float = 0.0
    rate: float = 0.0
    window: int = 256
    timeout: float = 1.0


@dataclass
class Result:
    """What became of the frames. Times are in seconds, latencies in microseconds."""

    sent: int = 0
    received: int = 0
    #: Sent, and never seen again, or too late.
    lost: int = 0
    #: Of those received: with other bytes than were sent; after one that was sent later.
    corrupt: int = 0
    reordered: int = 0
    #: Received too late, twice, or not of ours.
    late: int = 0
    duplicate: int = 0
    foreign: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0
    latency: Histogram = field(default_factory=Histogram)

    @property
    def flawless(self) -> bool:
        """Whether every frame came back once, as it was sent."""
        return bool(self.sent) and not (self.lost or self.corrupt or self.duplicate)

    def facts(self) -> dict[str, Any]:
        """Return everything as JSON has it; latencies are None while no frame has returned."""
        seconds = self.seconds or 1e-9
        counters = (*_COUNTERS, "sent_bytes", "received_bytes")
        facts: dict[str, Any] = {name: getattr(self, name) for name in counters}
        facts |= {"seconds": round(self.seconds, 6), "loss": self.lost / self.sent if self.sent else 0.0}
        facts |= {"rate": self.received / seconds, "bits_per_second": 8 * self.received_bytes / seconds}
        values = [self.latency.least, *self.latency.percentiles(list(_PERCENTILES.values())), self.latency.most]
        names = ["min", *_PERCENTILES, "max"]
        known = self.latency.count > 0
        return facts | {"latency_us": {name: value / 1000 if known else None for name, value in zip(names, values, strict=True)}}


class Generator:
    """One run. `progress` is called now and then with the result so far."""

    def __init__(self, link: Link, maker: FrameMaker, plan: Plan, progress: Callable[[Result], None] = lambda _: None) -> None:
        self._link: Final = link
        self._maker: Final = maker
        self._plan: Final = plan
        self._progress: Final = progress
        self.result: Final = Result()
        #: Numbers that are out, with when they were sent, oldest first; and those given up.
        self._out: Final[dict[int, int]] = {}
        self._given_up: Final[set[int]] = set()
        self._highest = -1
        self._began = 0
        self._stopped = False

    def stop(self) -> None:
        """Send no more; `run` returns once what is out has come back or is lost. From any thread or a signal handler."""
        self._stopped = True

    def run(self) -> Result:
        """Send, until the plan is done or `stop` is called, and wait for what is out. Errors as the link's."""
        self._began = last = time.monotonic_ns()
        reported = self._began
        while True:
            now = time.monotonic_ns()
            sent = self._send(now)
            received = self._receive()
            now = time.monotonic_ns()
            last = now if received else last
            self._give_up(now)
            if self._is_over(now) and not self._out:
                break
            if now - reported > PROGRESS_INTERVAL * 1e9:
                reported = now
                self._report(now)
            if not (sent or received):
                self._wait(now)
        self._report(last)
        return self.result

    # -- sending -----------------------------------------------------------------------------------------------------------

    def _is_over(self, now: int) -> bool:
        plan, sent = self._plan, self.result.sent
        in_time = not plan.seconds or now - self._began < plan.seconds * 1e9
        return self._stopped or not in_time or bool(plan.count and sent >= plan.count)

    def _send(self, now: int) -> int:
        """Send what is due, as far as there is room; return how many frames that were."""
        if self._is_over(now):
            return 0
        first = self.result.sent
        frames = [self._maker.make(first + i, time.monotonic_ns()) for i in range(self._due(now))]
        count = self._link.send(frames) if frames else 0
        for number, frame in enumerate(frames[:count], first):
            self._out[number] = now
            self.result.sent_bytes += len(frame)
        self.result.sent += count
        return count

    def _due(self, now: int) -> int:
        plan, sent = self._plan, self.result.sent
        due = min(BURST, plan.window - len(self._out))
        if plan.count:
            due = min(due, plan.count - sent)
        if plan.rate:
            due = min(due, int((now - self._began) * plan.rate / 1e9) + 1 - sent)
        return max(due, 0)

    def _wait(self, now: int) -> None:
        """Sleep until a frame comes, the next is due, or the oldest is lost."""
        moments = [now + int(PROGRESS_INTERVAL * 1e9)]
        if self._out:
            moments.append(next(iter(self._out.values())) + int(self._plan.timeout * 1e9))
        room = not self._is_over(now) and len(self._out) < self._plan.window
        if room and self._plan.rate:
            moments.append(self._began + int(self.result.sent / self._plan.rate * 1e9))
        self._link.wait(max(min(moments) - now, 0) / 1e9, room=room)

    # -- receiving ---------------------------------------------------------------------------------------------------------

    def _receive(self) -> int:
        frames = self._link.receive()
        now = time.monotonic_ns()
        for frame in frames:
            self._account(frame, now)
        return len(frames)

    def _account(self, frame: bytes, now: int) -> None:
        result, seen = self.result, self._maker.read(frame)
        if seen is None or not 0 <= seen.number < result.sent:
            result.foreign += 1
        elif self._out.pop(seen.number, None) is None:
            result.late += seen.number in self._given_up
            result.duplicate += seen.number not in self._given_up
        else:
            result.received += 1
            result.received_bytes += len(frame)
            result.corrupt += not seen.intact
            result.reordered += seen.number < self._highest
            self._highest = max(self._highest, seen.number)
            result.latency.add(max(0, now - seen.sent_ns))

    def _give_up(self, now: int) -> None:
        limit = now - int(self._plan.timeout * 1e9)
        while self._out:
            number, sent = next(iter(self._out.items()))
            if sent > limit:
                return
            del self._out[number]
            self._given_up.add(number)
            self.result.lost += 1

    def _report(self, until: int) -> None:
        self.result.seconds = (until - self._began) / 1e9
        self._progress(self.result)
