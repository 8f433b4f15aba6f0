"""Line charts as self-contained SVG: one function, `line_chart`, for whatever a command wants to draw.

No script, no font file, nothing fetched; colours follow the reader's light or dark setting. Lines are named where they
end, so that nobody has to match colours with a legend, and differ in their markers as well.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from collectives.errors import UsageError

WIDTH, HEIGHT = 900, 520
_LEFT, _TOP, _BOTTOM = 84, 84, 64
_CHARACTER = 7.4
_LINE_HEIGHT = 17.0
_PALETTE = (
    ("#0b62a8", "#6cb8ff"),
    ("#c2410c", "#ff9d5c"),
    ("#0f7a55", "#4fd1a1"),
    ("#8a2a8f", "#e59aea"),
    ("#8a6d00", "#e6c84a"),
    ("#b3123f", "#ff8aa8"),
    ("#3f4fb5", "#a9b4ff"),
    ("#4d5a61", "#b7c3ca"),
)
"""(on light, on dark): each at least 4.5:1 against its background, apart for the colour-blind too."""
_MARKERS = ("circle", "square", "diamond", "triangle")
_STYLE = """
svg { color-scheme: light dark; background: #ffffff; font: 13px system-ui, "Segoe UI", Roboto, sans-serif; }
text { fill: #2b3137; }
.title { font-size: 17px; font-weight: 600; }
.tick, .axis { fill: #5a6570; }
.grid { stroke: #e3e7ea; }
.frame { stroke: #98a2ab; }
.leader { stroke: #b4bcc4; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
"""
_DARK = """
svg { background: #15191d; }
text { fill: #e6eaee; }
.tick, .axis { fill: #a3aeb8; }
.grid { stroke: #2a3138; }
.frame { stroke: #66707a; }
.leader { stroke: #4d5761; }
"""

Points = Sequence[tuple[float, float]]
Format = Callable[[float], str]


def line_chart(
    series: Mapping[str, Points],
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    *,
    x_format: Format | None = None,
    y_format: Format | None = None,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """Draw lines.

    Args:
        series: by name, points (x, y) in the order in which they are joined. Names stand at the ends of their lines.
        title: above the chart.
        x_label, y_label: of the axes, with their units.
        log_x, log_y: logarithmic axes; all values must be positive then.
        x_format, y_format: of the numbers at the axes.
        x_ticks: where they stand on the x axis; None: at round numbers.

    Returns:
        The text of an SVG file.

    Raises:
        UsageError: there is no point, or one is not finite, or not positive on a logarithmic axis.

    """
    points = [point for line in series.values() for point in line]
    if not points or not all(map(math.isfinite, (value for point in points for value in point))):
        raise UsageError("a chart needs points, all of them finite")
    right = 34 + _CHARACTER * max(map(len, series))
    x = _Axis.over([px for px, _ in points], log_x, _LEFT, WIDTH - right, x_format or _plain)
    y = _Axis.over([py for _, py in points], log_y, HEIGHT - _BOTTOM, _TOP, y_format or _plain)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}{_colours(0)}@media (prefers-color-scheme: dark) {{{_DARK}{_colours(1)}}}</style>",
        f'<text class="title" x="{_LEFT}" y="30">{escape(title)}</text>',
        f'<text class="axis" x="{_LEFT}" y="{_TOP - 18}">{escape(y_label)}</text>',
        f'<text class="axis" x="{(x.low_at + x.high_at) / 2:.1f}" y="{HEIGHT - 16}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        *_grid(x, y, x.thinned(x_ticks) if x_ticks is not None else x.ticks()),
        *_lines(series, x, y),
        *_names(series, x, y),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True, slots=True)
class _Axis:
    """Places values from `low` to `high` between two positions in pixels."""

    low: float
    high: float
    log: bool
    low_at: float
    high_at: float
    format: Format

    @classmethod
    def over(cls, values: Sequence[float], log: bool, low_at: float, high_at: float, form: Format) -> "_Axis":
        """An axis that holds all these values, with some room. UsageError: not positive on a logarithmic one."""
        low, high = min(values), max(values)
        if log and low <= 0:
            raise UsageError(f"a logarithmic axis cannot show {low}")
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - abs(low or 1) / 2, high + abs(high or 1) / 2)
        room = 0.02
        if log:
            factor = (high / low) ** room
            return cls(low / factor, high * factor, log, low_at, high_at, form)
        if 0 <= low < (high - low) / 2:
            low = 0.0
        return cls(low, high + room * (high - low), log, low_at, high_at, form)

    def at(self, value: float) -> float:
        """Where a value is, in pixels."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.low_at + share * (self.high_at - self.low_at)

    def ticks(self) -> list[float]:
        """Round numbers, some six of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**decade for decade in decades for step in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= 7:
                    break
            return self.thinned(found)
        rough = (self.high - self.low) / 5
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough)
        return [number * step for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def thinned(self, ticks: Sequence[float]) -> list[float]:
        """Every n-th of these, so that at most eight are left, the last one among them."""
        inside = [tick for tick in ticks if self.low <= tick <= self.high]
        return inside[::-1][:: max(1, -(-len(inside) // 8))][::-1]


def _grid(x: _Axis, y: _Axis, x_ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in x_ticks:
        at = x.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.low_at:.1f}" y2="{y.high_at:.1f}"/>')
        label = escape(x.format(tick))
        parts.append(f'<text class="tick" x="{at:.1f}" y="{y.low_at + 20:.1f}" text-anchor="middle">{label}</text>')
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{x.low_at:.1f}" x2="{x.high_at:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        label = escape(y.format(tick))
        parts.append(f'<text class="tick" x="{x.low_at - 9:.1f}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(
        f'<line class="frame" x1="{x.low_at:.1f}" x2="{x.high_at:.1f}" y1="{y.low_at:.1f}" y2="{y.low_at:.1f}"/>'
    )
    return parts


def _lines(series: Mapping[str, Points], x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for number, (name, line) in enumerate(series.items()):
        places = [(x.at(px), y.at(py)) for px, py in line]
        colour, marker = f"c{number % len(_PALETTE)}", _MARKERS[number % len(_MARKERS)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        dots = "".join(_marker(marker, px, py) for px, py in places)
        parts.append(
            f'<g><title>{escape(name)}</title><polyline class="line s{colour}" points="{path}"/>'
            f'<g class="f{colour}">{dots}</g></g>'
        )
    return parts


def _marker(kind: str, x: float, y: float) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    if kind == "square":
        return f'<rect x="{x - 3.1:.1f}" y="{y - 3.1:.1f}" width="6.2" height="6.2"/>'
    if kind == "diamond":
        return f'<path d="M{x:.1f} {y - 4.4:.1f}l4.4 4.4l-4.4 4.4l-4.4 -4.4z"/>'
    return f'<path d="M{x:.1f} {y - 4.2:.1f}l4 7.2h-8z"/>'


def _names(series: Mapping[str, Points], x: _Axis, y: _Axis) -> list[str]:
    """Each line's name to the right of its end; a thin line leads to those that had to give way."""
    ends = [
        (y.at(line[-1][1]), x.at(line[-1][0]), number, name)
        for number, (name, line) in enumerate(series.items())
        if line
    ]
    ends.sort()
    places = _apart([end[0] for end in ends], y.high_at, y.low_at)
    parts = []
    for (at, end, number, name), place in zip(ends, places, strict=True):
        start = x.high_at + 18
        parts.append(f'<path class="leader" fill="none" d="M{end + 6:.1f} {at:.1f}L{start - 4:.1f} {place:.1f}"/>')
        colour = f"fc{number % len(_PALETTE)}"
        parts.append(f'<text class="{colour}" x="{start:.1f}" y="{place + 4.5:.1f}">{escape(name)}</text>')
    return parts


def _apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places in order, at least a line's height apart and as near to those wanted as that allows.

    Neighbours that would overlap form a block around the mean of what they want (pool adjacent violators).
    """
    blocks: list[tuple[float, int]] = []  # (sum of wanted first places, members)
    for number, want in enumerate(wanted):
        blocks.append((want - number * _LINE_HEIGHT, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + members)
    first = [total / members for total, members in blocks for _ in range(members)]
    highest = bottom - (len(first) - 1) * _LINE_HEIGHT
    return [max(top, min(at, highest)) + number * _LINE_HEIGHT for number, at in enumerate(first)]


def _colours(mode: int) -> str:
    rules = (
        f".sc{i} {{ stroke: {pair[mode]}; }} .fc{i}, text.fc{i} {{ fill: {pair[mode]}; }}"
        for i, pair in enumerate(_PALETTE)
    )
    return "\n".join(rules) + "\n"


def _plain(value: float) -> str:
    return f"{value:g}"
