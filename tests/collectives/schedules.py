"""Schedules of every algorithm that there is, for the tests that prove and run them: plain ones, and varied ones.

A varied one has all that its algorithm takes: a finish, uneven parts, a ring in another order, hosts of unlike size.
Everything follows from the world's size, so that failures can be had again.
"""

import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from collectives import choice
from collectives.schedule import Schedule

Maker = Callable[[int, int], Schedule]
"""(world, count) -> schedule. The blocks of a plain all-to-all are equal, so its count is rounded up."""


def lengths(chance: random.Random, count: int, parts: int) -> tuple[int, ...]:
    """`count` cut in so many parts at random places."""
    cuts = [0, *sorted(chance.randint(0, count) for _ in range(parts - 1)), count]
    return tuple(stop - start for start, stop in pairwise(cuts))


def plain(kind: str, algorithm: str, world: int, count: int) -> Schedule:
    """Without finish, in order of ranks, on one host. Rooted kinds have their root in the first half."""
    root = world // 3 if "root" in choice.takes(kind, algorithm) else 0
    if kind == "all_to_all":
        count = -(-count // world**2) * world**2
    return choice.build(kind, algorithm, world, count, root=root)


def varied(kind: str, algorithm: str, world: int, count: int) -> Schedule:
    """With all that the algorithm takes."""
    chance, takes = random.Random(1000 * world + count), choice.takes(kind, algorithm)
    return choice.build(
        kind,
        algorithm,
        world,
        count,
        finish="finish" in takes,
        root=chance.randrange(world) if "root" in takes else 0,
        counts=lengths(chance, count, world * world if kind == "all_to_all" else world) if "counts" in takes else None,
        order=chance.sample(range(world), world),
        hosts=[chance.randrange(1 + world // 3) for _ in range(world)],
    )


def _all(make: Callable[[str, str, int, int], Schedule]) -> dict[str, Maker]:
    return {f"{name} {kind}": partial(make, kind, name) for kind in choice.kinds() for name in choice.names(kind)}


PLAIN: dict[str, Maker] = _all(plain)
"""By "algorithm kind"."""
VARIED: dict[str, Maker] = {f"{name}, varied": maker for name, maker in _all(varied).items()}
