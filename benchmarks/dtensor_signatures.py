"""Our table of signatures beside DTensor's rules, on the same sample calls: `python -m benchmarks.dtensor_signatures`.

DTensor's rules are read with torch's own `torch.distributed.tensor._ops.strategy_validation` (which needs the package
`expecttest`), along one axis of two ranks. What one side has and the other has not is tried by brute force with our
verifier. Where we have one operation for several of torch's (`einsum`, `reshape`), the sample is compared as the
operation that torch would run. Averages, which we do not have as partial values of operations, are left out, and so is
what follows from another rule by calling equal values their own maximum.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor._ops import strategy_validation as theirs
from torch.testing._internal.distributed.fake_pg import FakeStore

from launch.display import print_table
from parallel.graph import Node, Value, operation, substitute
from parallel.layout import Broadcast, Mesh, Partial, Placement, Split
from parallel.signatures import Signature, signatures
from parallel.signatures.samples import Call, samples
from parallel.signatures.table import TABLE, may_split
from parallel.signatures.verify import fault, follows

WORLD = 2
RENAMED = {
    ("aten.einsum.default", "ab,bc->ac"): "aten.mm.default",
    ("aten.einsum.default", "abc,acd->abd"): "aten.bmm.default",
    ("aten.einsum.default", "ab,b->a"): "aten.mv.default",
    ("aten.einsum.default", "a,a->"): "aten.dot.default",
}


def as_torch(node: Node) -> Node | None:
    """The operation that torch would run for a node of ours; None if there is no single one."""
    if node.op == "aten.einsum.default":
        name = RENAMED.get((node.op, str(node.args[0])))
        operands = node.args[1]
        return Node(node.name, name, operands, (), node.outputs) if name and isinstance(operands, tuple) else None
    return None if node.op == "aten.reshape.default" else node  # `view` has samples of its own


def placement(text: str) -> Placement | None:
    """Theirs as ours; None for what we have not."""
    parsed = theirs.parse_placement(text)
    if parsed is None:
        return None
    if parsed.is_replicate():
        return Broadcast()
    if parsed.is_shard():
        return Split(parsed.dim)  # type: ignore[attr-defined]
    kind = parsed.reduce_op  # type: ignore[attr-defined]
    return Partial(kind) if kind in {"sum", "max", "min"} else None


def rules(call: Call, node: Node) -> set[Signature]:
    """DTensor's rules for a call, as signatures of splits that leave nobody without any."""
    feed = iter(call.tensors)
    args = tuple(substitute(arg, feed) for arg in node.args)
    kwargs = {name: substitute(arg, feed) for name, arg in node.kwargs}
    tensors = theirs.extract_tensors_from_args(args, kwargs)
    with contextlib.redirect_stdout(io.StringIO()):
        found = theirs._query_dtensor_rules(
            operation(node.op),
            tensors,
            args,
            kwargs,
            tuple(tuple(tensor.shape) for _, tensor in tensors),
            tuple(value.shape for value in node.outputs),
            WORLD,
            verbose=False,
        )
    made = set()
    for inputs, outputs in found:
        before, after = [placement(text) for text in inputs], [placement(text) for text in outputs]
        placements = list(zip((*node.inputs, *node.outputs), (*before, *after), strict=False))
        if len(before) == len(node.inputs) and all(_usable(value, one) for value, one in placements):
            made.add(Signature(tuple(p for p in before if p), tuple(p for p in after if p)))
    return made


def _usable(value: Value, one: Placement | None) -> bool:
    if isinstance(one, Split):
        return one.dim < len(value.shape) and may_split(value.shape[one.dim], WORLD)
    return one is not None


def ours(node: Node) -> set[Signature]:
    """Our signatures, but the one that is all `Broadcast`, which DTensor's tool leaves out, too."""
    return {one for one in signatures(node, WORLD) if any(not isinstance(p, Broadcast) for p in one.inputs)}


def compare() -> Iterator[tuple[str, str, int, list[str], list[str], list[str]]]:
    """Of each call: family, operation, what both have, only we, only they (it holds), only they (it does not hold)."""
    for call in samples():
        node = as_torch(call.node)
        if node is None or not call.tensors:
            continue
        mine, other = ours(call.node), rules(call, node)
        known = signatures(call.node, WORLD)
        extra = {one for one in other - mine if not any(follows(one, claimed) for claimed in known)}
        holding = {one for one in extra if not fault(call, [one], Mesh.of(x=WORLD))}
        missed = mine - other
        yield (
            TABLE[call.node.op].family,
            node.op.removeprefix("aten."),
            len(mine & other),
            sorted(map(str, missed)),
            sorted(map(str, holding)),
            sorted(map(str, extra - holding)),
        )


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    notes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family, op, both, only_ours, only_theirs, wrong in compare():
        row = sums[family]
        for at, count in enumerate((1, both, len(only_ours), len(only_theirs), len(wrong))):
            row[at] += count
        for kind, found in (("we alone", only_ours), ("DTensor alone", only_theirs), ("does not hold", wrong)):
            notes[kind][op].update(found)
    headings = ("family", "calls", "both", "we alone", "DTensor alone, holds", "DTensor alone, does not hold")
    print_table(headings, [(family, *map(str, row)) for family, row in sorted(sums.items())])
    for kind, by_op in notes.items():
        print(f"\n{kind}:")
        for op in sorted(by_op):
            if by_op[op]:
                print(f"  {op}: {'; '.join(sorted(by_op[op]))}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
