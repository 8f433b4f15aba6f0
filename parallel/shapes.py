"""What views do to dimensions. Used by capture to write graphs, and by the signatures of views."""

Sizes = tuple[int, ...]


def factors(merged: Sizes, apart: Sizes) -> list[Sizes] | None:
    """The run of dimensions of `apart` behind each dimension of `merged`; None if a view is not of this kind.

    Both shapes have the same number of elements. Dimensions of size 1 go with the one that follows, or with the last.
    """
    groups: list[Sizes] = []
    rest = list(apart)
    for size in merged:
        group: list[int] = []
        product = 1
        while rest and (product < size or not group):
            group.append(rest.pop(0))
            product *= group[-1]
        if product != size:
            return None
        groups.append(tuple(group))
    if rest and not groups:
        return None
    if rest:
        groups[-1] += tuple(rest)
    return groups if all(size == 1 for size in rest) else None
