"""The report of a run as one self-contained HTML page. `launch.report` calls `page`; `launch.story` says what happened.

Nothing is fetched, and the page forbids it: tables, SVG, and one script that zooms and explains. Colours follow the
reader's light or dark setting. What is wide scrolls within its frame, so that the page fits a phone.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from launch.figures import percentile
from launch.report_script import SCRIPT
from launch.report_style import STYLE
from launch.report_time import time_charts
from launch.story import KINDS, Recovery, Story
from launch.units import duration, size

MOST_BARS = 24
"""Recoveries that are drawn one by one; of more, the slowest."""
MOST_LINKS = 16
"""Members of whom the table of links tells; of more, those that moved the most bytes."""
_PARTS = (("q1", "detect"), ("q2", "re-form"), ("q3", "first good operation"))
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LOSS = (1000, 260)


def page(story: Story, source: str, window: tuple[float, float] | None = None) -> str:
    """The page. `source`: the name of the log; `window`: seconds from and to that the drawing over time shows."""
    start, stop = window or (0.0, max(story.seconds, 1e-3))
    parts = [
        _head(story, source),
        _section("Who was there", time_charts(story, start, stop) if story.lives else ""),
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
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
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
        ("lasted", _long(story.seconds)),
        (story.unit, f"{done:,}"),
        ("peers in all", f"{peers:,}"),
        ("at a time", _range([count for _, count in story.world])),
        ("faults", f"{len(story.marks):,}"),
        ("worst return to work", _seconds(max((r.total for r in story.recoveries), default=None))),
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
    """Percentiles by the fault, then the slowest as bars."""
    found = story.recoveries
    if not found:
        return ""
    kinds = [kind for kind in (*KINDS, "several", "loss") if any(one.kind == kind for one in found)]
    rows = _percentiles("all", found)
    if len(kinds) > 1:
        rows += "".join(_percentiles(kind, [one for one in found if one.kind == kind]) for kind in kinds)
    medians = "".join(f"<th>{name}</th>" for _, name in _PARTS)
    table = (
        "<div class='wide'><table><thead><tr><th></th><th></th><th colspan='4' class='median'>median</th><th>99th</th>"
        "<th>worst</th></tr><tr><th>lost by</th><th>how often</th>"
        f"{medians}<th>in all</th><th>in all</th><th>in all</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    shown = sorted(found, key=lambda one: one.total, reverse=True)[:MOST_BARS]
    what = "all of them" if len(shown) == len(found) else f"the slowest {len(shown)} of {len(found)}"
    note = f"<p class='note'>Times from the fault to the last survivor. Below, {what}; press one to see it above.</p>"
    key = "".join(f'<span class="key"><i class="{look}"></i>{name}</span>' for look, name in _PARTS)
    return f"{table}{note}<p>{key}</p><div class='bars'>{_bars(shown)}</div>"


def _percentiles(name: str, found: Sequence[Recovery]) -> str:
    totals = [one.total for one in found]
    values = [
        *(percentile(part, 50) for part in zip(*((r.detect, r.reform, r.first) for r in found), strict=True)),
        *(percentile(totals, percent) for percent in (50, 99, 100)),
    ]
    cells = "".join(f"<td>{_seconds(value)}</td>" for value in values)
    return f"<tr><th>{name}</th><td>{len(found)}</td>{cells}</tr>"


def _bars(shown: Sequence[Recovery]) -> str:
    """A bar a recovery in three parts, all of them on one scale."""
    longest = max(*(one.total for one in shown), 1e-3)
    rows = []
    for one in shown:
        parts = "".join(
            f'<i class="{look}" style="width:{seconds / longest * 100:.2f}%"></i>'
            for (look, _), seconds in zip(_PARTS, (one.detect, one.reform, one.first), strict=True)
        )
        words = escape(f"{one.label}: {', '.join(f'{n} {_seconds(v)}' for n, v in _named(one))}")
        rows.append(
            f'<button type="button" data-at="{one.at:.2f}" data-long="{one.total:.2f}" title="{words}">'
            f'<span class="when">{one.at:.1f} s</span><span class="what">{escape(one.label)}</span>'
            f'<span class="bar">{parts}</span><span class="long">{_seconds(one.total)}</span></button>'
        )
    return "".join(rows)


def _named(one: Recovery) -> list[tuple[str, float]]:
    return list(zip((name for _, name in _PARTS), (one.detect, one.reform, one.first), strict=True))


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
    moved: Counter[int] = Counter()
    for (sender, receiver), count in story.traffic.items():
        moved[sender] += count
        moved[receiver] += count
    members = sorted(member for member, _ in moved.most_common(MOST_LINKS))
    told = {sender for sender, _ in story.traffic}
    most = max(story.traffic.values()) or 1
    head = "".join(f"<th>to {member}</th>" for member in members)
    rows = ""
    for sender in members:
        if sender not in told:
            continue
        cells = ""
        for receiver in members:
            count = story.traffic.get((sender, receiver), 0)
            share = f' style="--share:{count / most:.2f}"' if count else ""
            cells += f"<td{share}>{size(count) if count else ''}</td>"
        rows += f"<tr><th>member {sender}</th>{cells}</tr>"
    table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>"
    few = f"The {len(members)} of {len(moved)} members that moved the most. " if len(members) < len(moved) else ""
    note = f"{few}{size(sum(story.traffic.values()))} in all; who was killed could not tell what it had sent."
    return f'<div class="wide"><table class="heat">{table}</table></div><p class="note">{note}</p>'


def _checks(story: Story) -> str:
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="{"good" if good else "bad"}">{"ok" if good else "failed"}</td>'
        f'<td class="text">{escape(detail)}</td></tr>'
        for name, good, detail in story.checks
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def _long(seconds: float) -> str:
    return duration(seconds) if seconds < 120 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "-"
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])


def _thinned(points: Sequence[tuple[int, float]], most: int = 2000) -> Sequence[tuple[int, float]]:
    """So many points at most; the last is among them."""
    every = max(1, -(-len(points) // most))
    return [*points[:-1:every], points[-1]]
