"""Which parameter is which number of an optimizer: torch numbers them group by group, and keeps no names.

Within a group parameters have the order of the model, and moments have the shape of their parameter. Used for DeepSpeed
without ZeRO and for Megatron's legacy files.
"""

from collections.abc import Mapping, Sequence

from checkpoint.lazy import PiecesMissing

Shape = tuple[int, ...]


def assign(
    shapes: Mapping[str, Shape],
    slots: Sequence[Sequence[Shape | None]],
    names: Sequence[Sequence[str] | None],
    where: str,
    hints: Mapping[str, int] | None = None,
) -> list[list[str]]:
    """Name the numbered parameters of each group.

    Args:
        shapes: parameters of the model in its order.
        slots: for each group, the shapes of its numbered parameters in order; None where there is no moment to tell.
        names: for each group, the names, where the optimizer kept them.
        where: names the checkpoint in errors.
        hints: the group of parameters, where it follows from another rule.

    Raises:
        PiecesMissing: there is no such assignment, or more than one.

    """
    if names and all(row is not None and len(row) == len(slot) for row, slot in zip(names, slots, strict=True)):
        return [list(row or ()) for row in names]
    order = list(shapes.items())
    found = _paths(order, slots, hints or {})
    if found is None:
        raise PiecesMissing(f"{where}: shapes of the optimizer's state do not fit those of the model's parameters")
    if found is _SEVERAL:
        raise PiecesMissing(
            f"{where}: the optimizer numbers its parameters without names, and shapes alone do not tell which of them "
            f"are frozen or in which group; name those that are frozen in a --spec:\n"
            f'[[pattern]]\nmatch = \'NAME\'\naxis = "optimizer"\nhow = "frozen"'
        )
    groups: list[list[str]] = [[] for _ in slots]
    for (name, _), group in zip(order, found, strict=True):
        if group >= 0:
            groups[group].append(name)
    return groups


_SEVERAL: list[int] = []


def _paths(
    order: Sequence[tuple[str, Shape]], slots: Sequence[Sequence[Shape | None]], hints: Mapping[str, int]
) -> list[int] | None:
    """The group of each parameter (-1: none), `_SEVERAL` if there are several ways, None if there is none.

    Walks the model once for each state (how many slots of every group are filled), and keeps up to two ways to each.
    """
    skips = len(order) - sum(map(len, slots))
    if skips < 0:
        return None
    start = (0,) * len(slots)
    ways: dict[tuple[int, ...], tuple[int, list[int]]] = {start: (1, [])}
    for name, shape in order:
        following: dict[tuple[int, ...], tuple[int, list[int]]] = {}
        for filled, (count, path) in ways.items():
            choices = [hints[name]] if name in hints else [-1, *range(len(slots))]
            for group in choices:
                if group < 0:
                    state = filled
                elif filled[group] < len(slots[group]) and slots[group][filled[group]] in (None, shape):
                    state = tuple(n + (g == group) for g, n in enumerate(filled))
                else:
                    continue
                before = following.get(state, (0, []))[0]
                following[state] = (before + count, [*path, group])
        # what skips more than may be skipped leads nowhere
        done = len(next(iter(following.values()))[1]) if following else 0
        ways = {state: way for state, way in following.items() if done - sum(state) <= skips}
    end = tuple(map(len, slots))
    if end not in ways:
        return None
    count, path = ways[end]
    return path if count == 1 else _SEVERAL
