"""The proof of the table, by brute force: every placement of inputs and outputs of every operation is tried.

Called by `ringhold signatures` and by the tests. Each sample call runs whole, and on the shards of every rank with the
code that the executor uses (`localize`); the shards of the results must make up the whole result. A signature of the
table that does not hold is *unsound*. One that holds in all trials and is not in the table is *missing*: the planner
could use it and does not.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from parallel.graph import Value
from parallel.layout import Layout, Mesh, Partial, Placement, Split
from parallel.signatures.lookup import localize, signatures, together
from parallel.signatures.samples import Call
from parallel.signatures.shards import agrees, distribute
from parallel.signatures.signature import Signature
from parallel.signatures.table import PARTIALS, PMAX, PMIN, TABLE, B, P, Run, may_split, unchanged

TRIALS = 2
"""Ways of writing partial values that a signature must stand."""
MOST = 1000
"""Of a call with more ways than this to place its inputs, extremes are left out of the search for missing signatures,
and where there are still more, so many are drawn."""


UNSEARCHED = {"attention", "norms", "pooling", "softmax"}
"""Families whose kernels, given shapes that do not fit, read beyond their memory or divide by zero, and the process
ends: only what the table claims is tried of them."""


@dataclass
class Finding:
    """What was found of one operation."""

    op: str
    family: str
    sound: int = 0
    """Signatures that hold, on one axis, over all samples and worlds."""
    pairs: int = 0
    """Pairs of signatures that hold together on a mesh of two axes."""
    unsound: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)


def verify(
    calls: Iterable[Call], worlds: Sequence[int], meshes: Sequence[tuple[int, int]], searched: Sequence[int] = ()
) -> list[Finding]:
    """Try the table's signatures of each call on these worlds and meshes, and search some worlds for missing ones."""
    found: dict[str, Finding] = {}
    for call in calls:
        finding = found.setdefault(call.node.op, Finding(call.node.op, TABLE[call.node.op].family))
        for world in worlds:
            _try_claims(call, world, finding)
        for world in searched:
            finding.missing.update(map(str, missing(call, world)))
        for sizes in meshes:
            _try_pairs(call, sizes, finding)
    return sorted(found.values(), key=lambda finding: (finding.family, finding.op))


def _try_claims(call: Call, world: int, finding: Finding) -> None:
    for signature in signatures(call.node, world):
        if reason := fault(call, [signature], Mesh.of(x=world)):
            finding.unsound.append(f"{call}: {signature} on {world} ranks: {reason}")
        else:
            finding.sound += 1


def _try_pairs(call: Call, sizes: tuple[int, int], finding: Finding) -> None:
    mesh = Mesh.of(x=sizes[0], y=sizes[1])
    for chosen in product(*(signatures(call.node, size) for size in sizes)):
        if together(call.node, chosen, sizes):
            if reason := fault(call, chosen, mesh):
                finding.unsound.append(f"{call}: {' and '.join(map(str, chosen))} on {mesh}: {reason}")
            else:
                finding.pairs += 1


def fault(call: Call, chosen: Sequence[Signature], mesh: Mesh) -> str:
    """Why signatures, one for each axis, do not hold for a call; empty if they do."""
    try:
        runs = [localize(call.node, chosen, mesh, rank) for rank in mesh.ranks]
        whole = call.node.call(call.tensors)
        inputs = _layouts(call.node.inputs, mesh, [one.inputs for one in chosen])
        outputs = _layouts(call.node.outputs, mesh, [one.outputs for one in chosen])
        for trial in range(TRIALS):
            results = _run(call, runs, inputs, trial)
            for at, (layout, expected) in enumerate(zip(outputs, whole, strict=True)):
                if not agrees([result[at] for result in results], layout, expected):
                    return f"output {at} is not {layout.placements}"
    except (RuntimeError, IndexError, ValueError) as error:
        return f"it does not run: {error}"
    return ""


def _layouts(values: Sequence[Value], mesh: Mesh, by_axis: Sequence[Sequence[Placement]]) -> list[Layout]:
    return [Layout(mesh, tuple(placements[at] for placements in by_axis)) for at in range(len(values))]


def _run(call: Call, runs: Sequence[Run], layouts: Sequence[Layout], seed: int) -> list[tuple[Tensor, ...]]:
    """Each rank's results, on shards that are written anew for each seed."""
    generator = torch.Generator().manual_seed(seed)
    by_input = [distribute(tensor, layout, generator) for tensor, layout in zip(call.tensors, layouts, strict=True)]
    return [run([shards[rank] for shards in by_input]) for rank, run in enumerate(runs)]


def missing(call: Call, world: int) -> Iterator[Signature]:
    """Signatures that hold on one axis and neither are in the table nor follow from one that is."""
    if TABLE[call.node.op].family in UNSEARCHED:
        return
    known = signatures(call.node, world)
    for signature in _holding(call, world):
        if not any(follows(signature, claimed) for claimed in known):
            yield signature


def _holding(call: Call, world: int) -> Iterator[Signature]:
    """All signatures that hold, the unhelpful ones too."""
    for inputs in _placements(call, world):
        for outputs in _outputs(call, inputs, world):
            yield Signature(inputs, outputs)


def _placements(call: Call, world: int) -> Iterable[tuple[Placement, ...]]:
    """Ways to place the inputs: all of them, or as many as `MOST` says."""
    for partials in (PARTIALS, (P,)):
        choices = [list(_choices(value, world, partials)) for value in call.node.inputs]
        if math.prod(map(len, choices)) <= MOST:
            return product(*choices)
    chance = random.Random(0)
    return {tuple(map(chance.choice, choices)) for _ in range(MOST)}


def _choices(value: Value, world: int, partials: Sequence[Partial]) -> Iterator[Placement]:
    yield B
    yield from (Split(dim) for dim, size in enumerate(value.shape) if may_split(size, world))
    if value.dtype != torch.bool:
        yield from partials


def _outputs(call: Call, inputs: tuple[Placement, ...], world: int) -> Iterator[tuple[Placement, ...]]:
    """Which placements of outputs hold for one of inputs; shards run once unless the outputs' sizes are arguments."""
    mesh = Mesh.of(x=world)
    choices = [list(_choices(value, world, PARTIALS)) for value in call.node.outputs]
    if TABLE[call.node.op].local is not unchanged:
        for outputs in product(*choices):
            if not fault(call, [Signature(inputs, outputs)], mesh):
                yield outputs
        return
    layouts = [Layout(mesh, (placement,)) for placement in inputs]
    runs = [call.node.call] * world
    whole = call.node.call(call.tensors)
    for trial in range(TRIALS):
        try:
            results = _run(call, runs, layouts, trial)
        except (RuntimeError, IndexError, ValueError):
            return
        for at, expected in enumerate(whole):
            shards = [result[at] for result in results]
            choices[at] = [p for p in choices[at] if agrees(shards, Layout(mesh, (p,)), expected)]
    yield from product(*choices)


def follows(signature: Signature, claimed: Signature) -> bool:
    """Whether a signature is a weaker form of another: equal values on all ranks are extremes of themselves, too."""

    def weaker(one: Placement, other: Placement) -> bool:
        return one == other or (other == B and one in {PMAX, PMIN})

    inputs = zip(signature.inputs, claimed.inputs, strict=True)
    outputs = zip(signature.outputs, claimed.outputs, strict=True)
    return all(weaker(theirs, ours) for ours, theirs in inputs) and all(weaker(*pair) for pair in outputs)
