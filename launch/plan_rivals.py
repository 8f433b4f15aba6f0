"""What else a step could be planned like: data parallelism alone, tensor parallelism alone, and how plans differ."""

from collections.abc import Mapping

from parallel.capturing import Step
from parallel.explain import folded, written
from parallel.graph import Role
from parallel.layout import Broadcast, Mesh, Split
from parallel.machine import Machine
from parallel.options import of_input
from parallel.planner import NoPlan, plan
from parallel.plans import Placements, Plan
from parallel.tables import seconds, size


def compare(
    step: Step,
    mesh: Mesh,
    machine: Machine,
    tied: bool,
    pins: Mapping[str, Placements],
    memory: float | None,
    redundancy: int,
) -> dict[str, Plan | None]:
    """The best plans of some kinds; None where nothing of that kind keeps within the memory and the pins."""
    whole = (Broadcast(),) * len(mesh.axes)
    spread = (Split(0),) * len(mesh.axes)
    kinds: dict[str, dict[str, Placements]] = {"data parallelism alone": {}, "tensor parallelism alone": {}}
    for source in step.graph.inputs:
        if source.role == Role.BATCH:
            able = spread in of_input(source, mesh)
            kinds["data parallelism alone"][source.name] = spread if able else whole
            kinds["tensor parallelism alone"][source.name] = whole
        elif source.role in {Role.PARAMETER, Role.STATE}:
            kinds["data parallelism alone"][source.name] = whole
    found: dict[str, Plan | None] = {}
    for name, wanted in kinds.items():
        try:
            found[name] = plan(step, mesh, memory, wanted | dict(pins), machine, tied, redundancy=redundancy)
        except NoPlan:
            found[name] = None
    if pins:
        found["without the pins"] = plan(step, mesh, memory, {}, machine, tied, redundancy=redundancy)
    return found


def summary(rival: Plan, best: Plan) -> str:
    """A plan in one line, and how it compares."""
    assert rival.figures is not None
    assert best.figures is not None
    sent = sum(reshard.nbytes for reshard in rival.collectives if reshard.value.shape)
    return (
        f"{seconds(rival.figures.time)} ({rival.figures.time / best.figures.time - 1:+.2%}), {size(sent)} sent in "
        f"{len(rival.collectives)} collectives, {size(rival.figures.memory)} a rank"
    )


def differences(rival: Plan, best: Plan) -> list[str]:
    """The tensors that live elsewhere, folded over layers."""
    lines: dict[str, None] = {}
    for name, layout in rival.layouts.items():
        other = best.layouts[name]
        if layout != other:
            lines[f"{folded(name)}: {written(layout.placements)} instead of {written(other.placements)}"] = None
    return list(lines)
