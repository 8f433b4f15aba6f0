"""What a run's report draws over time: members as lanes, faults, number of members, and what was done.

For `launch.report_page`. A lane is not a peer: when one is gone, the next one takes its lane, so that a run of an hour
with thousands of peers has as many lanes as it had peers at a time. All drawings are in seconds and are stretched to
their place: `launch.report_script` zooms by another view of the same shapes, and draws what must not be stretched.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from launch.story import KINDS, Life, Story

STATES = ("alive", "healing", "joining", "waiting", "starting", "stopped", "cut off")
LETTERS = dict(zip(KINDS, "KSLJCPWX", strict=True))
"""Of faults, in the lanes."""
ROW = 22
"""Pixels of a lane."""
_KIND_ROW = 13
_MEMBERS, _WORK = 72, 84
_BINS = 3600


def time_charts(story: Story, start: float, stop: float) -> str:
    """The drawings, at first from `start` to `stop` seconds, their legend, and what the script needs to know."""
    lanes = _lanes(story.lives)
    height = len(lanes) * ROW
    view = f"{start:.3f} {{}} {stop - start:.3f} {{}}"
    charts = [
        _chart("lanes", "Members over time", [_name(row, lane) for row, lane in enumerate(lanes)], ROW),
        _drawing(view, height, "lanes", [_bands(story, height), *_swimlanes(story, lanes)]),
        *_faults(story, view),
        *_members(story, view),
        *_work(story, view),
    ]
    used = {span.state for life in story.lives for span in life.spans}
    key = "".join(f'<span class="key"><i class="{_look(s)}"></i>{s}</span>' for s in STATES if s in used)
    if any(life.ended == "dead" for life in story.lives):
        key += '<span class="key"><i class="end"></i>died</span>'
    if story.recoveries:
        key += '<span class="key"><i class="band"></i>a recovery</span>'
    tools = "".join(
        f'<button type="button" data-do="{what}" title="{title}">{label}</button>'
        for what, label, title in (
            ("all", "whole run", "Show all of it"),
            ("in", "+", "Zoom in"),
            ("out", "&minus;", "Zoom out"),
            ("back", "&larr;", "Earlier"),
            ("on", "&rarr;", "Later"),
        )
    )
    data = json.dumps(_data(story, lanes), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<p>{key}</p><p class="tools" hidden>{tools}<span class="note">Drag to zoom; point at anything for details.'
        f'</span></p><noscript><p class="note">Drawn from {start:g} to {stop:g} s. Times, letters and zooming need '
        f'scripts.</p></noscript><div class="time">{"".join(charts)}<div class="ticks"></div></div>'
        f'<div class="tip" hidden></div><script type="application/json" id="run">{data}</script>'
    )


def _chart(name: str, title: str, labels: Iterable[str], row: int) -> str:
    """The left side of a drawing: its labels, one above the other."""
    rows = "".join(f'<div style="height:{row}px;line-height:{row}px">{escape(label)}</div>' for label in labels)
    return f'<div class="labels {name}" title="{escape(title)}">{rows}</div>'


def _drawing(view: str, height: float, name: str, shapes: Iterable[str]) -> str:
    """The right side."""
    return (
        f'<div class="plot" data-chart="{name}"><svg class="zoomed" height="{height}" preserveAspectRatio="none" '
        f'viewBox="{view.format(0, height)}" role="img" aria-label="{name} over time">{"".join(shapes)}</svg></div>'
    )


def _lanes(lives: Sequence[Life]) -> list[list[Life]]:
    """Put lives that do not overlap one behind the other; the coordinator comes first, by itself."""
    lanes: list[list[Life]] = []
    own = [life for life in lives if life.name == "coordinator"]
    for life in sorted((one for one in lives if one.name != "coordinator"), key=lambda one: one.start):
        lane = next((lane for lane in lanes if lane[-1].stop <= life.start), None)
        if lane is None:
            lanes.append([life])
        else:
            lane.append(life)
    return ([own] if own else []) + lanes


def _name(row: int, lane: Sequence[Life]) -> str:
    return lane[0].name if len({life.name for life in lane}) == 1 else f"lane {row}"


def _look(state: str) -> str:
    return state.replace(" ", "-")


def _swimlanes(story: Story, lanes: Sequence[Sequence[Life]]) -> Iterator[str]:
    paths: defaultdict[str, list[str]] = defaultdict(list)
    ends = []
    for row, lane in enumerate(lanes):
        y = row * ROW + 4
        for life in lane:
            for span in life.spans:
                if span.stop > span.start:
                    paths[span.state].append(f"M{span.start:.2f} {y}H{span.stop:.2f}v14H{span.start:.2f}z")
            if life.ended == "dead":
                ends.append(f"M{life.stop:.2f} {y - 2}v18")
    for state, pieces in paths.items():
        yield f'<path class="{_look(state)}" d="{"".join(pieces)}"/>'
    yield f'<path class="end" d="{"".join(ends)}"/>'
    rows = _rows(lanes)
    strokes = [f"M{mark.at:.2f} {rows[id(mark.life)] * ROW + 1}v10" for mark in story.marks if id(mark.life) in rows]
    yield f'<path class="fault" d="{"".join(strokes)}"/>'


def _rows(lanes: Sequence[Sequence[Life]]) -> dict[int, int]:
    return {id(life): row for row, lane in enumerate(lanes) for life in lane}


def _bands(story: Story, height: float) -> str:
    """Behind a drawing: the time of each recovery."""
    path = "".join(f"M{r.at:.2f} 0H{r.at + r.total:.2f}V{height}H{r.at:.2f}z" for r in story.recoveries)
    return f'<path class="band" d="{path}"/>'


def _faults(story: Story, view: str) -> Iterator[str]:
    """A row of strokes for each kind."""
    kinds = [kind for kind in KINDS if any(mark.kind == kind for mark in story.marks)]
    if kinds:
        yield _chart("faults", "Faults over time", (f"{kind} {LETTERS[kind]}" for kind in kinds), _KIND_ROW)
        strokes = (
            f"M{mark.at:.2f} {kinds.index(mark.kind) * _KIND_ROW + 2}v{_KIND_ROW - 4}"
            for mark in story.marks
            if mark.kind in kinds
        )
        yield _drawing(view, len(kinds) * _KIND_ROW, "faults", [f'<path class="strokes" d="{"".join(strokes)}"/>'])


def _scale(name: str, title: str, height: int, most: str) -> str:
    """The left side of a curve: its name, and at the ends of its height 0 and the highest value."""
    return (
        f'<div class="labels {name} scale" style="height:{height}px" title="{escape(title)}"><span>{most}</span>'
        f"<span>{escape(title)}</span><span>0</span></div>"
    )


def _members(story: Story, view: str) -> Iterator[str]:
    """Number of members, as steps."""
    if story.world:
        most = max(count for _, count in story.world)
        scale = (_MEMBERS - 8) / max(most, 1)
        path = ""
        for at, count in story.world:
            y = _MEMBERS - 2 - count * scale
            path += f"M{at:.2f} {y:.1f}" if not path else f"H{at:.2f}V{y:.1f}"
        path += f"H{story.seconds:.2f}"
        yield _scale("members", "members", _MEMBERS, str(most))
        yield _drawing(view, _MEMBERS, "members", [f'<path class="world" d="{path}"/>'])


def _work(story: Story, view: str) -> Iterator[str]:
    """Steps or operations a second; recoveries lie behind."""
    rates = list(_rates(story))
    if rates:
        most = max(rate for _, _, rate in rates) or 1.0
        scale = (_WORK - 6) / most
        path = "".join(f"M{a:.2f} {_WORK}V{_WORK - rate * scale:.1f}H{b:.2f}V{_WORK}z" for a, b, rate in rates if rate)
        yield _scale("work", f"{story.unit}/s", _WORK, f"{most:.3g}")
        yield _drawing(view, _WORK, "work", [_bands(story, _WORK), f'<path class="work" d="{path}"/>'])


def _rates(story: Story) -> Iterator[tuple[float, float, float]]:
    """From when, to when, so much a second: between times of which the work done is known, some thousand at most."""
    points = [(0.0, 0.0), *story.progress]
    if len(points) < 3:
        return
    least = story.seconds / _BINS
    kept = [points[0]]
    for point in points[1:]:
        if point[0] - kept[-1][0] > least or point is points[-1]:
            kept.append(point)
    for (before, first), (after, last) in pairwise(kept):
        if after > before:
            yield before, after, (last - first) / (after - before)


def _data(story: Story, lanes: Sequence[Sequence[Life]]) -> dict[str, Any]:
    """What a pointer asks for."""
    rows = _rows(lanes)
    return {
        "seconds": round(story.seconds, 3),
        "row": ROW,
        "unit": story.unit,
        "states": STATES,
        "kinds": KINDS,
        "letters": [*LETTERS.values()],
        "lanes": [[_told(life) for life in lane] for lane in lanes],
        "marks": [
            [round(mark.at, 2), rows.get(id(mark.life), -1), KINDS.index(mark.kind), mark.peer, mark.detail]
            for mark in sorted(story.marks, key=lambda mark: mark.at)
            if mark.kind in KINDS
        ],
        "recoveries": [[round(r.at, 2), round(r.total, 3), r.label] for r in story.recoveries],
        "members": [[round(at, 2), count] for at, count in story.world],
        "work": [[round(a, 2), round(b, 2), round(rate, 2)] for a, b, rate in _rates(story)],
    }


def _told(life: Life) -> list[Any]:
    spans = [[STATES.index(span.state), round(span.start, 2)] for span in life.spans]
    return [life.name, ", ".join(map(str, life.members)), spans, round(life.stop, 2), life.ended]
