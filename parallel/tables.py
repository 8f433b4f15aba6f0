"""A plan as text: what lives where, what is sent because of it, what it takes. Called by `Plan.explain`."""

from collections.abc import Sequence

from parallel.explain import copied, optimality, places, traffic, written
from parallel.graph import Phase, Role
from parallel.plans import Plan

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def text(plan: Plan, most: int = 40) -> str:
    """Explain a plan; tables are cut after `most` rows, the largest first."""
    parts = [f"mesh {plan.mesh}"]
    rows = [
        (name, f"x{count}" if count > 1 else "", written(placed), size(nbytes))
        for name, placed, count, nbytes in places(plan, frozenset({Role.PARAMETER, Role.BATCH, Role.BUFFER}))
    ]
    parts.append(_table(("tensor", "", "placement", "bytes, whole"), rows))
    moved = sorted(traffic(plan, (r for r in plan.collectives if r.value.shape)), key=lambda each: -each.nbytes)
    lines = [
        (
            each.label,
            f"x{each.count}" if each.count > 1 else "",
            each.phase,
            each.kind,
            each.change,
            ",".join(each.axes),
            size(each.nbytes),
        )
        for each in moved[:most]
    ]
    if lines:
        parts.append(_table(("what is sent", "", "phase", "collective", "change", "axis", "bytes sent"), lines))
    if len(moved) > most:
        rest = moved[most:]
        parts.append(f"... and {len(rest)} smaller ones, {size(sum(each.nbytes for each in rest))} in all")
    parts.append(totals(plan))
    return "\n\n".join(parts) + "\n"


def totals(plan: Plan) -> str:
    """Totals of a plan: bytes by phase, time, memory, what is proven."""
    others = [reshard for reshard in plan.collectives if reshard.value.shape]
    loss = sum(reshard.nbytes for reshard in plan.collectives if not reshard.value.shape)
    by_phase = (f"{phase} {size(sum(r.nbytes for r in others if r.phase == phase))}" for phase in Phase)
    lines = [
        f"sent by all ranks   {size(sum(r.nbytes for r in others))} in {len(others)} collectives "
        f"({', '.join(by_phase)}); apart from it the loss, {size(loss)}"
    ]
    if plan.redundancy:
        sent = sum(copy.nbytes for copy in plan.replicas)
        lines.append(
            f"second copies       {size(copied(plan))} a rank, of {len(plan.replicas)} tensors that are nowhere whole; "
            f"{size(sent)} sent by all ranks"
        )
    figures = plan.figures
    if figures is not None:
        held = ", ".join(
            f"{name} {size(nbytes)}" for name, nbytes in sorted(figures.at_peak.items(), key=lambda i: -i[1])
        )
        copying = f", second copies {seconds(figures.copying)}" if figures.copying else ""
        lines += [
            f"predicted time      {seconds(figures.time)} a step: compute {seconds(figures.compute)}, "
            f"communication {seconds(figures.communication)}{copying} ({figures.machine})",
            f"predicted memory    {size(figures.memory)} a rank at the peak: {held}",
            f"optimality          {optimality(plan)}",
        ]
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Bytes as `1.5 MiB`."""
    for unit, scale in _UNITS:
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 1000 * scale else f"{nbytes / scale:.0f} {unit}"
    return f"{nbytes:.0f} B"


def seconds(value: float) -> str:
    """Seconds as `1.5 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value * 1e6:.4g} µs"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[at]) for row in (headings, *rows)) for at in range(len(headings))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
