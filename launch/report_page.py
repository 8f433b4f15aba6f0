"""The report of a run as one self-contained HTML page. `launch.report` calls `page`; `launch.story` says what happened.

No script, nothing fetched: tables, and SVG that a browser scales. Colours follow the reader's light or dark setting;
states differ in shape or in their label as well. What is wide scrolls within its frame, so that the page fits a phone.
"""

import time
from collections.abc import Iterable, Sequence
from html import escape

from launch.figures import percentile
from launch.report_style import STYLE
from launch.report_time import time_charts
from launch.story import KINDS, Recovery, Story
from launch.units import duration, size

MOST_BARS = 40
"""Recoveries that are drawn one by one; of more, the slowest."""
MOST_LINKS = 24
"""Members of whom the table of links tells."""
_LOSS = (1000, 260)


def page(story: Story, source: str, window: tuple[float, float] | None = None) -> str:
    """The page. `source`: the name of the log; `window`: seconds from and to that the drawing over time shows."""
    start, stop = window or (0.0, max(story.seconds, 1e-3))
    parts = [
        _head(story, source),
        _section("Who was there", time_charts(story, start, stop)),
        _section("Recoveries", _recoveries(story)),
        _section("Loss", _losses(story)),
        _section("Bytes between members", _traffic(story)),
        _section("What was checked", _checks(story)),
        _section("Do it again", f"<pre>{escape(story.replay)}</pre>" if story.replay else ""),
    ]
    title = f"Ringhold: {story.command or 'run'}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _head(story: Story, source: str) -> str:
    word, look = {True: ("passed", "good"), False: ("failed", "bad"), None: ("no verdict", "none")}[story.passed]
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(story.began)) if story.began else ""
    done = int(story.progress[-1][1]) if story.progress else 0
    struck = [f"{sum(m.kind == kind for m in story.marks)} {kind}" for kind in KINDS]
    peers = sum(life.name != "coordinator" for life in story.lives)
    facts = [
        ("lasted", duration(story.seconds)),
        (story.unit, f"{done:,}"),
        ("peers in all", str(peers)),
        ("at a time", _range([count for _, count in story.world])),
        ("faults", f"{len(story.marks)}"),
        ("worst return to work", _seconds(max((_total(r) for r in story.recoveries), default=None))),
        *([("seed", str(story.seed))] if story.seed is not None else []),
    ]
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    kinds = ", ".join(text for text in struck if not text.startswith("0 "))
    return (
        f'<header><p class="verdict {look}">{word}</p><h1>ringhold {escape(story.command or "run")}</h1>'
        f'<p class="note">{escape(when)} &middot; {escape(source)}{" &middot; " + escape(kinds) if kinds else ""}</p>'
        f"<dl>{tiles}</dl></header>"
    )


def _recoveries(story: Story) -> str:
    """Percentiles, then bars."""
    found = story.recoveries
    if not found:
        return ""
    columns = (
        ("detect", [r.detect for r in found]),
        ("re-form", [r.reform for r in found]),
        ("first good operation", [r.first for r in found]),
        ("in all", [_total(r) for r in found]),
    )
    rows = "".join(
        f"<tr><th>{name}</th>"
        + "".join(f"<td>{_seconds(percentile(values, percent))}</td>" for percent in (50, 99, 100))
        + "</tr>"
        for name, values in columns
    )
    table = (
        '<div class="wide"><table><thead><tr><th>seconds from the fault on</th><th>median</th><th>99th</th>'
        f"<th>worst</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    shown = sorted(sorted(found, key=_total)[-MOST_BARS:], key=lambda r: r.at)
    left = len(found) - len(shown)
    note = f'<p class="note">The slowest {len(shown)} of {len(found)}.</p>' if left else ""
    key = "".join(
        f'<span class="key"><i class="{c}"></i>{t}</span>'
        for c, t in (("q1", "detect"), ("q2", "re-form"), ("q3", "first good operation"))
    )
    return f"{table}{note}<p>{key}</p><div class='wide'>{_bars(shown)}</div>"


def _bars(shown: Sequence[Recovery]) -> str:
    """A bar a recovery in three parts, all of them on one scale."""
    longest = max(*map(_total, shown), 1e-3)
    width, left, row = 1000, 330, 24
    scale = (width - left - 90) / longest
    parts = []
    for number, one in enumerate(shown):
        y, x = number * row, float(left)
        parts.append(
            f'<text class="name" x="{left - 10}" y="{y + 16}">{one.at:.1f} s &#160; {escape(_short(one.label))}</text>'
        )
        for look, seconds in (("q1", one.detect), ("q2", one.reform), ("q3", one.first)):
            parts.append(
                f'<rect class="{look}" x="{x:.1f}" y="{y + 4}" width="{max(seconds * scale, 0.8):.1f}" height="15"/>'
            )
            x += max(seconds * scale, 0.8)
        parts.append(f'<text x="{x + 7:.1f}" y="{y + 16}">{_seconds(_total(one))}</text>')
    return (
        f'<svg viewBox="0 0 {width} {len(shown) * row + 4}" role="img" aria-label="Parts of each recovery">'
        + "".join(parts)
        + "</svg>"
    )


def _losses(story: Story) -> str:
    if len(story.losses) < 2:
        return ""
    width, height = _LOSS
    left, right, top, bottom = 60, 20, 16, 40
    steps = [step for step, _ in story.losses]
    values = [loss for _, loss in (*story.losses, *story.reference)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def place(points: Iterable[tuple[int, float]]) -> str:
        x = (width - left - right) / max(1, steps[-1] - steps[0])
        y = (height - top - bottom) / span
        return " ".join(f"{left + (s - steps[0]) * x:.1f},{top + (high - v) * y:.1f}" for s, v in points)

    lines = "".join(
        f'<text class="tick" x="{left - 8}" y="{top + (height - top - bottom) * share + 4:.1f}" text-anchor="end">'
        f"{high - span * share:.2f}</text>"
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{top + (height - top - bottom) * share:.1f}" '
        f'y2="{top + (height - top - bottom) * share:.1f}"/>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    ends = "".join(
        f'<text class="tick" x="{x}" y="{height - 14}" text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in ((left, "start", f"step {steps[0]}"), (width - right, "end", f"step {steps[-1]}"))
    )
    under = f'<polyline class="reference" points="{place(_thinned(story.reference))}"/>' if story.reference else ""
    over = f'<polyline class="loss" points="{place(_thinned(story.losses))}"/>'
    note = '<span class="key"><i class="own"></i>this run</span>'
    if story.reference:
        worst = max((abs(a - b) for (_, a), (_, b) in zip(story.losses, story.reference, strict=False)), default=0.0)
        note += '<span class="key"><i class="ref"></i>without faults, one process</span>'
        note += f'<span class="note">largest difference {worst:.1e}</span>'
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Loss by step">{lines}{ends}{under}{over}</svg>'
    return f"<p>{note}</p><div class='wide'>{svg}</div>"


def _traffic(story: Story) -> str:
    """A table of senders and receivers, shaded by bytes."""
    if not story.traffic:
        return ""
    members = sorted({member for pair in story.traffic for member in pair})[:MOST_LINKS]
    most = max(story.traffic.values()) or 1
    head = "".join(f"<th>to {member}</th>" for member in members)
    rows = ""
    for sender in members:
        cells = ""
        for receiver in members:
            count = story.traffic.get((sender, receiver), 0)
            share = f' style="--share:{count / most:.2f}"' if count else ""
            cells += f"<td{share}>{size(count) if count else ''}</td>"
        rows += f"<tr><th>member {sender}</th>{cells}</tr>"
    table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="wide"><table class="heat">{table}</table></div>'


def _checks(story: Story) -> str:
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="{"good" if good else "bad"}">{"ok" if good else "failed"}</td>'
        f'<td class="text">{escape(detail)}</td></tr>'
        for name, good, detail in story.checks
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def _total(one: Recovery) -> float:
    return one.detect + one.reform + one.first


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "-"
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])


def _short(text: str) -> str:
    return text if len(text) <= 38 else text[:37] + "…"


def _thinned(points: Sequence[tuple[int, float]], most: int = 2000) -> Sequence[tuple[int, float]]:
    """So many points at most; the last is among them."""
    every = max(1, -(-len(points) // most))
    return [*points[:-1:every], points[-1]]
