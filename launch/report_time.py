"""What a run's report draws over time: members as lanes, their number, and what was done. For `launch.report_page`.

A lane is not a peer: when one is gone, the next one takes its lane, so that a run of an hour with thousands of peers
has as many lanes as it had peers at a time. All three drawings have one axis of time.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from launch.story import Life, Mark, Story

WIDTH = 1000
_LEFT, _RIGHT = 92, 16
_ROW = 22
_GLYPHS = {
    "kill": "K",
    "stop": "S",
    "leave": "L",
    "join": "J",
    "coordinator": "C",
    "partition": "P",
    "slow": "W",
    "corrupt": "X",
}
_STATES = ("alive", "healing", "joining", "waiting", "starting", "stopped")
_MANY = 1500
"""With more spans than this, those of a state become one path, without words that a pointer brings up."""
_BINS = 240


def time_charts(story: Story, start: float, stop: float) -> str:
    """The drawings from `start` to `stop` seconds, and their legend."""
    axis = _Axis(start, stop)
    lanes = _lanes([life for life in story.lives if life.stop >= start and life.start <= stop])
    used = {span.state for life in story.lives for span in life.spans}
    key = "".join(f'<span class="key"><i class="{name}"></i>{name}</span>' for name in _STATES if name in used)
    kinds = [kind for kind in _GLYPHS if any(mark.kind == kind for mark in story.marks)]
    key += "".join(f'<span class="key"><b>{_GLYPHS[kind]}</b> {kind}</span>' for kind in kinds)
    height = len(lanes) * _ROW + 30
    parts = [*_bands(story, axis, height - 26), *_swimlanes(story, lanes, axis), *axis.ticks(height - 22)]
    members = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Members over time">{"".join(parts)}</svg>'
    charts = [members, _world(story, axis), _work(story, axis)]
    return f"<p>{key}</p><div class='wide'>{''.join(charts)}</div>"


class _Axis:
    def __init__(self, start: float, stop: float) -> None:
        self.start, self.stop = start, stop
        self.scale = (WIDTH - _LEFT - _RIGHT) / max(stop - start, 1e-9)

    def at(self, seconds: float) -> float:
        return _LEFT + (min(max(seconds, self.start), self.stop) - self.start) * self.scale

    def inside(self, seconds: float) -> bool:
        return self.start <= seconds <= self.stop

    def ticks(self, y: float) -> Iterator[str]:
        rough = (self.stop - self.start) / 8
        steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
        step = next((s for s in steps if s >= rough), rough)
        number = int(self.start / step)
        while number * step <= self.stop:
            if number * step >= self.start:
                x, text = self.at(number * step), _clock(number * step, step)
                yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y:.1f}"/>'
                yield f'<text class="tick" x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{text}</text>'
            number += 1


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


def _swimlanes(story: Story, lanes: Sequence[Sequence[Life]], axis: _Axis) -> Iterator[str]:
    many = sum(len(life.spans) for lane in lanes for life in lane) > _MANY
    paths: defaultdict[str, list[str]] = defaultdict(list)
    rows: dict[int, int] = {}
    gone: list[str] = []
    for row, lane in enumerate(lanes):
        y = row * _ROW
        name = lane[0].name if len({life.name for life in lane}) == 1 else f"lane {row}"
        yield f'<text class="name" x="{_LEFT - 10}" y="{y + 15}">{escape(name)}</text>'
        for life in lane:
            rows[id(life)] = row
            for span in life.spans:
                x, end = axis.at(span.start), axis.at(span.stop)
                if end <= x:
                    continue
                if many:
                    paths[span.state].append(f"M{x:.1f} {y + 4}H{end:.1f}V{y + 18}H{x:.1f}z")
                    continue
                who = life.name + (f" (members {', '.join(map(str, life.members))})" if life.members else "")
                words = escape(f"{who}: {span.state}, {span.start:.2f} to {span.stop:.2f} s")
                yield (
                    f'<rect class="{span.state}" x="{x:.1f}" y="{y + 4}" width="{end - x:.1f}" height="14">'
                    f"<title>{words}</title></rect>"
                )
            if life.ended == "dead" and axis.inside(life.stop):
                gone.append(f"M{axis.at(life.stop) - 4:.1f} {y + 7}l8 8m0 -8l-8 8")
    for state, pieces in paths.items():
        yield f'<path class="{state}" d="{"".join(pieces)}"/>'
    yield f'<path class="gone" d="{"".join(gone)}"/>'
    yield from _marks(story, rows, axis, many)


def _marks(story: Story, rows: dict[int, int], axis: _Axis, many: bool) -> Iterator[str]:
    for mark in story.marks:
        life = _struck(story, mark)
        row = rows.get(id(life)) if life is not None else None
        if row is None or not axis.inside(mark.at):
            continue
        x, y = axis.at(mark.at), row * _ROW + 11
        if many:
            yield f'<circle class="glyph" cx="{x:.1f}" cy="{y}" r="1.6"/>'
            continue
        words = escape(f"{mark.kind} of {mark.peer} at {mark.at:.2f} s {mark.detail}".strip())
        yield (
            f'<g><title>{words}</title><circle class="glyph" cx="{x:.1f}" cy="{y}" r="7.5"/>'
            f'<text class="mark" x="{x:.1f}" y="{y + 4}">{_GLYPHS.get(mark.kind, "?")}</text></g>'
        )


def _struck(story: Story, mark: Mark) -> Life | None:
    """The life that a fault struck."""
    lives = [life for life in story.lives if life.name == mark.peer and life.start <= mark.at + 1]
    return next((life for life in lives if life.stop >= mark.at), lives[-1] if lives else None)


def _bands(story: Story, axis: _Axis, height: float) -> Iterator[str]:
    """Behind the drawing: the time of each recovery."""
    for one in story.recoveries:
        end = one.at + one.detect + one.reform + one.first
        if axis.inside(one.at) or axis.inside(end):
            x, width = axis.at(one.at), max(axis.at(end) - axis.at(one.at), 0.5)
            yield f'<rect class="band" x="{x:.1f}" y="0" width="{width:.1f}" height="{height:.1f}"/>'


def _world(story: Story, axis: _Axis) -> str:
    """Number of members, as steps."""
    points = [(at, count) for at, count in story.world if at <= axis.stop]
    if not points:
        return ""
    most, height = max(count for _, count in points), 90
    scale = 58 / most
    path, last = "", 0
    for at, count in points:
        y = 68 - count * scale
        path += f"M{axis.at(at):.1f} {y:.1f}" if not path else f"H{axis.at(at):.1f}V{y:.1f}"
        last = count
    path += f"H{axis.at(axis.stop):.1f}"
    marks = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{68 - n * scale:.1f}" y2="{68 - n * scale:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 10}" y="{72 - n * scale:.1f}" text-anchor="end">{n}</text>'
        for n in sorted({0, most, (most + 1) // 2})
    )
    label = f'<text class="tick" x="{_LEFT}" y="{height - 6}">members ({last} at the end)</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Number of members over time">'
        f'{marks}<path class="world" d="{path}"/>{label}</svg>'
    )


def _work(story: Story, axis: _Axis) -> str:
    """Steps or operations a second, in bins; recoveries lie behind."""
    points = [(0.0, 0.0), *story.progress]
    if len(points) < 3:
        return ""
    width = (axis.stop - axis.start) / _BINS
    done = [0.0] * _BINS
    for (before, first), (after, last) in pairwise(points):
        for index in range(max(0, int((before - axis.start) / width)), _BINS):
            low, high = axis.start + index * width, axis.start + (index + 1) * width
            if low >= after:
                break
            share = min(high, after) - max(low, before)
            done[index] += (last - first) * max(0.0, share) / max(after - before, 1e-9)
    rates = [count / width for count in done]
    most = max(rates) or 1.0
    wide = (WIDTH - _LEFT - _RIGHT) / _BINS
    bars = "".join(
        f"M{_LEFT + n * wide:.1f} 80v{-rate / most * 66:.1f}h{wide:.2f}V80z" for n, rate in enumerate(rates) if rate
    )
    bands = "".join(_bands(story, axis, 80))
    ticks = f'<text class="tick" x="{_LEFT - 10}" y="18" text-anchor="end">{most:.3g}</text>'
    ticks += f'<text class="tick" x="{_LEFT - 10}" y="84" text-anchor="end">0</text>'
    label = f'<text class="tick" x="{_LEFT}" y="98">{escape(story.unit)} a second; behind: recoveries</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} 104" role="img" aria-label="{escape(story.unit)} a second over time">'
        f'{bands}<path class="work" d="{bars}"/>{ticks}{label}</svg>'
    )


def _clock(seconds: float, step: float) -> str:
    if step < 1:
        return f"{seconds:.1f} s"
    if seconds < 120 and step < 60:
        return f"{seconds:g} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
