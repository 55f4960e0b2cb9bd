"""What the loopback benchmark makes of its samples: paired ratios with their uncertainty, a table, a chart."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any, Final

#: A round counts when backend and client both had at least this share of a processor.
FAIR_SHARE: Final = 0.93
RESAMPLES: Final = 10_000


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median by bootstrap; always the same for the same ratios."""
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES * 25 // 1000], medians[RESAMPLES * 975 // 1000]


def spread(rates: Sequence[float]) -> dict[str, float] | None:
    """Return median and extremes of rates in million frames per second."""
    if not rates:
        return None
    return {name: round(f(rates) / 1e6, 3) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def summarize(case: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the rounds of a case say. Each has samples by backend, `python` perhaps missing."""
    fair = [r for r in rounds if min(r["dpdk"].share, r["c"].share) >= FAIR_SHARE]
    ratios = [r["c"].rate / r["dpdk"].rate for r in fair]
    slow = [r["python"].rate for r in rounds if "python" in r and r["python"].share >= FAIR_SHARE]
    found: dict[str, Any] = {
        "case": case,
        "rounds": len(rounds),
        "dropped": len(rounds) - len(fair),
        "dpdk": spread([r["dpdk"].rate for r in fair]),
        "c": spread([r["c"].rate for r in fair]),
        "python": spread(slow),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    if ratios:
        low, high = interval(ratios)
        found |= {"ratio": round(statistics.median(ratios), 3), "interval": [round(low, 3), round(high, 3)]}
    return found


def line(summary: dict[str, Any]) -> str:
    """Return a case in one line of a table in Markdown."""

    def cell(name: str) -> str:
        value = summary[name]
        return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})" if value else "-"

    ratio = (
        f"**{summary['ratio']:.2f}** [{summary['interval'][0]:.2f}, {summary['interval'][1]:.2f}]" if "ratio" in summary else "-"
    )
    cells = [summary["case"], cell("dpdk"), cell("c"), ratio, cell("python"), f"{summary['dropped']} of {summary['rounds']}"]
    return "| " + " | ".join(cells) + " |"


HEADER: Final = (
    "| frames | DPDK's backend, Mframes/s | our loopback, C engine | ratio, 95 % interval | Python engine | rounds dropped |\n"
    "| --- | --- | --- | --- | --- | --- |"
)

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 380, 60, 40, 60
_BARS: Final = (
    ("dpdk", "#8a8f98", "DPDK vhost"),
    ("c", "#2f6f4f", "mdevkit, C engine"),
    ("python", "#c98a2b", "mdevkit, Python engine"),
)


def chart(summaries: Sequence[dict[str, Any]]) -> str:
    """Return a chart as SVG: medians as bars, extremes as whiskers, the ratio above."""
    highest = max((s[name]["max"] for s in summaries for name, _, _ in _BARS if s[name]), default=1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">Loopback, million frames per second</text>',
        *_axis(highest),
    ]
    group = (_WIDTH - _LEFT - 20) / max(1, len(summaries))
    for number, summary in enumerate(summaries):
        parts += _group(summary, _LEFT + number * group, group, highest)
    for number, (_, colour, label) in enumerate(_BARS):
        x = _LEFT + number * 200
        parts.append(f'<rect x="{x}" y="{_HEIGHT - 18}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{_HEIGHT - 8}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _y(value: float, highest: float) -> float:
    return _HEIGHT - _BOTTOM - value / (highest * 1.12) * (_HEIGHT - _TOP - _BOTTOM)


def _axis(highest: float) -> list[str]:
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 1e9) if highest / s <= 8)
    parts = []
    for tick in range(int(highest / step) + 1):
        y = _y(tick * step, highest)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick * step:g}</text>')
    return parts


def _group(summary: dict[str, Any], left: float, width: float, highest: float) -> list[str]:
    parts = [f'<text x="{left + width / 2:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{summary["case"]}</text>']
    bar = width / 5
    for number, (name, colour, _) in enumerate(_BARS):
        value = summary[name]
        if not value:
            continue
        x, top, base = left + bar * (number + 1), _y(value["median"], highest), _y(0, highest)
        parts.append(f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar * 0.85:.1f}" height="{base - top:.1f}" fill="{colour}"/>')
        middle, low, high = x + bar * 0.425, _y(value["min"], highest), _y(value["max"], highest)
        parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="black"/>')
    if "ratio" in summary:
        low, high = summary["interval"]
        text = f"x {summary['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        parts.append(f'<text x="{left + width / 2:.1f}" y="{_TOP}" text-anchor="middle" font-weight="bold">{text}</text>')
    return parts
