"""The double binary tree: logarithmic latency at full bandwidth, for messages that are cut in segments.

Two binary trees span all ranks, each for half of the buffer, and who is an inner rank of one is a leaf of the other.
So a rank passes on no more than `count` elements in each direction, however many ranks there are, and the depth is
logarithmic; an engine that passes each segment on as it arrives keeps all links busy (Sanders, Speck and Träff,
"Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009; as in NCCL since
2.4, whose rule for parents this follows).

Ranks are numbered from the root, number 0, which has one child in each tree. In the first tree odd numbers are leaves;
the second is the first with the other numbers mirrored if the world is odd, else moved by one, so that even ones are.
All that a rank has to reduce comes in the same step, which is the lowest that suits all ranks below it.

Schedules are remembered: the same arguments give the same object.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from collectives.algorithms.parts import Span, checked_root, everything, only
from collectives.algorithms.strand import NOBODY, Strand, finishing_root, remembered, schedule
from collectives.region import Ints
from collectives.schedule import Schedule

_NAME = "double_tree"
_CHILDREN = 2


@remembered
def all_reduce(world: int, count: int, finish: bool = False) -> Schedule:
    """Every rank ends with the reduction of all: up both trees to rank 0, and down again.

    About `2 log2(world)` steps of `count / 2` elements. With `finish`, rank 0 runs the elementwise kernel "finish".
    """
    trees = _trees(world, 0)
    top = max(tree.levels for tree in trees)
    strands = (
        *(_up(tree, half, count) for half, tree in enumerate(trees)),
        *(_down(tree, half, count, top + finish) for half, tree in enumerate(trees)),
    )
    end = finishing_root(finish, top, 0, count)
    held = wanted = everything(count)
    return schedule("all_reduce", _NAME, world, count, strands, held=held, wanted=wanted, finishes=end)


@remembered
def reduce(world: int, count: int, finish: bool = False, root: int = 0) -> Schedule:
    """Rank `root` ends with the reduction of all, and runs the elementwise kernel "finish" on it if asked.

    Raises:
        UsageError: `root` is not a rank.

    """
    trees = _trees(world, checked_root("reduce", root, world))
    strands = tuple(_up(tree, half, count) for half, tree in enumerate(trees))
    end = finishing_root(finish, max(tree.levels for tree in trees), root, count)
    held, wanted = everything(count), only(root, count)
    return schedule("reduce", _NAME, world, count, strands, held=held, wanted=wanted, finishes=end)


@remembered
def broadcast(world: int, count: int, root: int = 0) -> Schedule:
    """Every rank ends with the buffer of `root`.

    Raises:
        UsageError: `root` is not a rank.

    """
    strands = falling(world, count, checked_root("broadcast", root, world))
    return schedule("broadcast", _NAME, world, count, strands, held=only(root, count), wanted=everything(count))


def falling(world: int, count: int, root: int) -> tuple[Strand, ...]:
    """The broadcast from the root down both trees, from step 0 on."""
    return tuple(_down(tree, half, count, 0) for half, tree in enumerate(_trees(world, root)))


@dataclass(frozen=True, slots=True)
class _Tree:
    """A tree that spans all ranks; arrays have an entry a rank."""

    parent: Ints
    child: Ints
    """Shape (2, world): NOBODY where there is none."""
    side: Ints
    """Whether a rank is its parent's first child or the second."""
    depth: Ints
    height: Ints
    """Of the subtree: 0 for a leaf."""

    @property
    def levels(self) -> int:
        """Steps that it takes from the leaves to the root, or back."""
        return int(self.height.max())


def _trees(world: int, root: int) -> tuple[_Tree, _Tree]:
    number = np.arange(world)
    others = number[1:]
    second = number.copy()
    second[1:] = world - others if world % 2 else others % max(1, world - 1) + 1
    return _tree(world, root, number), _tree(world, root, second)


def _tree(world: int, root: int, label: Ints) -> _Tree:
    """The binary tree over labels, label 0 at the top; `label[i]` is that of the `i`-th rank from the root."""
    rank_of = np.empty(world, dtype=np.int64)
    rank_of[label] = (root + np.arange(world)) % world
    labels = np.arange(world)
    bit = labels & -labels
    above = labels ^ bit | bit << 1
    above = np.where(above < world, above, labels ^ bit)
    ranks, parents, sides = rank_of[1:], rank_of[above[1:]], (labels > above)[1:].astype(np.int64)
    parent, side = np.full(world, NOBODY), np.zeros(world, dtype=np.int64)
    parent[ranks], side[ranks] = parents, sides
    child = np.full((_CHILDREN, world), NOBODY)
    child[sides, parents] = ranks
    depth, height = np.zeros(world, dtype=np.int64), np.zeros(world, dtype=np.int64)
    for _ in range(world.bit_length()):
        depth[ranks] = depth[parents] + 1
        np.maximum.at(height, parents, height[ranks] + 1)
    return _Tree(parent, child, side, depth, height)


def _up(tree: _Tree, half: int, count: int) -> Strand:
    """From both children to their parent, in the step before the parent's own."""

    def target(turn: Ints, rank: Ints) -> Ints:
        due = tree.height[tree.parent[rank]] - 1, tree.side[rank]
        return np.where(_now(turn, *due), tree.parent[rank], NOBODY)

    def source(turn: Ints, rank: Ints) -> Ints:
        side = turn % _CHILDREN
        return np.where(_now(turn, tree.height[rank] - 1, side), tree.child[side, rank], NOBODY)

    return Strand(range(tree.levels), target, source, _half(half, count), combine=True, turns=_CHILDREN)


def _down(tree: _Tree, half: int, count: int, first: int) -> Strand:
    """From a parent to both children, in the step of its depth."""

    def target(turn: Ints, rank: Ints) -> Ints:
        side = turn % _CHILDREN
        return np.where(_now(turn, tree.depth[rank], side), tree.child[side, rank], NOBODY)

    def source(turn: Ints, rank: Ints) -> Ints:
        return np.where(_now(turn, tree.depth[rank] - 1, tree.side[rank]), tree.parent[rank], NOBODY)

    return Strand(range(first, first + tree.levels), target, source, _half(half, count), turns=_CHILDREN)


def _now(turn: Ints, step: Ints, side: Ints) -> Ints:
    return np.asarray(turn == _CHILDREN * step + side)


def _half(half: int, count: int) -> Callable[[Ints, Ints], Span]:
    middle = (count + 1) // 2
    low, high = (middle, count) if half else (0, middle)
    return lambda turn, rank: (np.full_like(rank, low), np.full_like(rank, high))
