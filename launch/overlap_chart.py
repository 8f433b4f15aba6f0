"""A timeline of computing against transfers as self-contained SVG, from the events of a trace (`launch.trace.merge`).

Each rank has a band: on top what it computes, below it a line for each peer that it sends to, filled while a message is
on its way. Only the last operation of the trace that ran kernels is drawn.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from collectives.errors import UsageError
from launch import units

Event = dict[str, Any]
Interval = tuple[float, float]

WIDTH = 1000
_LEFT, _RIGHT, _TOP = 92, 24, 76
_COMPUTE, _LINE, _GAP = 22, 9, 16
_STYLE = """
svg { color-scheme: light dark; background: #ffffff; font: 13px system-ui, "Segoe UI", Roboto, sans-serif; }
text { fill: #2b3137; } .title { font-size: 17px; font-weight: 600; } .small { font-size: 11px; fill: #5a6570; }
.grid { stroke: #e3e7ea; } .band { fill: #f3f5f7; }
.compute { fill: #0b62a8; stroke: #ffffff; stroke-width: 0.6; } .merge { fill: #0f7a55; } .move { fill: #c2410c; }
@media (prefers-color-scheme: dark) {
svg { background: #15191d; } text { fill: #e6eaee; } .small { fill: #a3aeb8; } .grid { stroke: #2a3138; }
.band { fill: #1d2328; } .compute { fill: #6cb8ff; stroke: #15191d; } .merge { fill: #4fd1a1; } .move { fill: #ff9d5c; }
}
"""


def overlap_chart(events: Sequence[Event], title: str) -> str:
    """Draw the last operation with kernels.

    Raises:
        UsageError: no operation in the trace computed anything.

    """
    kernels = [event for event in events if event.get("args", {}).get("kernel") is True]
    if not kernels:
        raise UsageError("nothing in this trace computed; there is no overlap to draw")
    begin, end = _last_operation(events, kernels)
    shown = [event for event in kernels if begin <= event["ts"] < end]
    moves = _moves(events, begin, end)
    ranks = sorted({event["pid"] for event in shown})
    names = {pid: number for number, pid in enumerate(ranks)}
    parts, y = [], float(_TOP)
    scale = (WIDTH - _LEFT - _RIGHT) / max(end - begin, 1e-9)

    def bar(kind: str, at: float, height: float, interval: Interval, about: str) -> str:
        x, width = _LEFT + (interval[0] - begin) * scale, max(0.5, (interval[1] - interval[0]) * scale)
        told = f"<title>{escape(about)}</title>"
        return f'<rect class="{kind}" x="{x:.1f}" y="{at:.1f}" width="{width:.1f}" height="{height}">{told}</rect>'

    for pid in ranks:
        peers = sorted(dst for src, dst in moves if src == pid)
        height = _COMPUTE + 4 + _LINE * len(peers)
        parts.append(f'<rect class="band" x="{_LEFT}" y="{y}" width="{WIDTH - _LEFT - _RIGHT}" height="{height}"/>')
        parts.append(f'<text x="12" y="{y + 15}">rank {names[pid]}</text>')
        for event in (event for event in shown if event["pid"] == pid):
            kind = "compute" if event["name"].startswith("attend") else "merge"
            span = event["ts"], event["ts"] + event["dur"]
            parts.append(bar(kind, y, _COMPUTE, span, f"{event['name']}: {units.duration(event['dur'] / 1e6)}"))
        for number, peer in enumerate(peers):
            at = y + _COMPUTE + 4 + number * _LINE
            parts.append(
                f'<text class="small" x="{_LEFT - 6}" y="{at + 8}" text-anchor="end">to {names.get(peer, 0)}</text>'
            )
            for span in _union(moves[pid, peer]):
                about = f"to rank {names.get(peer, 0)}: {units.duration((span[1] - span[0]) / 1e6)}"
                parts.append(bar("move", at + 1, _LINE - 2, span, about))
        y += height + _GAP
    bottom = y - _GAP
    return "\n".join([*_frame(title, bottom, (end - begin) / 1e6, scale), *parts, "</svg>"]) + "\n"


def _frame(title: str, bottom: float, seconds: float, scale: float) -> list[str]:
    height = bottom + 46
    step = next(step for step in _steps() if seconds / step <= 8)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="12" y="28">{escape(title)}</text>',
    ]
    for number, (kind, word) in enumerate((("compute", "attention"), ("merge", "merge, copy"), ("move", "under way"))):
        left = 12 + 110 * number
        lines.append(
            f'<rect class="{kind}" x="{left}" y="42" width="14" height="11"/><text x="{left + 20}" y="52">{word}</text>'
        )
    for number in range(int(seconds / step) + 1):
        x = _LEFT + number * step * 1e6 * scale
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom + 6:.1f}"/>')
        told = units.duration(number * step) if number else "0"
        lines.append(f'<text class="small" x="{x:.1f}" y="{bottom + 22:.1f}" text-anchor="middle">{told}</text>')
    return lines


def _steps() -> Iterable[float]:
    scale = 1e-6
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10


def _last_operation(events: Sequence[Event], kernels: Sequence[Event]) -> Interval:
    """When the last operation that ran kernels began on the first rank, and ended on the last."""
    spans = [event for event in events if event.get("ph") == "X" and "seq" in event.get("args", {})]
    last = max(kernels, key=lambda event: float(event["ts"]))
    inside = [
        span for span in spans if span["pid"] == last["pid"] and span["ts"] <= last["ts"] <= span["ts"] + span["dur"]
    ]
    if not inside:
        return min(float(kernel["ts"]) for kernel in kernels), max(float(k["ts"] + k["dur"]) for k in kernels)
    same = [span for span in spans if span["args"]["seq"] == inside[0]["args"]["seq"]]
    same = [span for span in same if span["name"] == inside[0]["name"]]
    moved = [kernel for kernel in kernels if min(s["ts"] for s in same) <= kernel["ts"]]
    first = min(float(kernel["ts"]) for kernel in moved)
    return first, max(float(span["ts"] + span["dur"]) for span in same)


def _moves(events: Sequence[Event], begin: float, end: float) -> dict[tuple[int, int], list[Interval]]:
    """By sender and receiver, from when to when each message was under way."""
    left = {event["id"]: event for event in events if event.get("ph") == "s"}
    found: defaultdict[tuple[int, int], list[Interval]] = defaultdict(list)
    for event in events:
        start = left.get(event.get("id", "")) if event.get("ph") == "f" else None
        if start is not None and begin <= start["ts"] and event["ts"] <= end:
            found[start["pid"], event["pid"]].append((start["ts"], event["ts"]))
    return found


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined
