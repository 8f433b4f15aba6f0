"""Products of flattened tensors become products of the tensors themselves.

Used by `parallel.lowering`. Torch flattens the tokens of (batch, length, width) before a matrix product and restores
them behind it, because its kernels take matrices. A planner could then split the tokens by batches only. Where all that
take part in a product agree on the dimensions behind a merged one, the product is written over these: `ab,bc->ac`
becomes `xyb,bc->xyc`, the views vanish, and any of the dimensions may be split.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from parallel.graph import Argument, Node, Value
from parallel.shapes import Sizes, factors
from parallel.writer import EINSUM, PERMUTE, VIEW, Writer


def merge(nodes: Sequence[Node]) -> tuple[list[Node], dict[str, Value]]:
    """Return the nodes with views drawn into products, and what the values that changed have become, by name."""
    return _Merging(nodes).run()


class _Merging:
    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.writer = Writer()
        self.now: dict[str, Value] = {}
        self.makers = {value.name: node for node in nodes for value in node.outputs}
        self.users: dict[str, list[Node]] = {}
        for node in nodes:
            for value in set(node.inputs):
                self.users.setdefault(value.name, []).append(node)

    def run(self) -> tuple[list[Node], dict[str, Value]]:
        for node in self.nodes:
            self.writer.phase, self.writer.module = node.phase, node.module
            self.now.update(zip((value.name for value in node.outputs), self._written(node), strict=True))
        return self.writer.nodes, self.now

    def _written(self, node: Node) -> Sequence[Value]:
        args: list[Any] = [self._known(arg) for arg in node.args]
        if node.op == VIEW:
            return (self.writer.view(args[0], node.outputs[0].shape),)
        if node.op == PERMUTE:
            return (self.writer.permute(args[0], args[1]),)
        if node.op == EINSUM:
            return (self._product(node),)
        return self.writer.copy(node, args, {name: self._known(arg) for name, arg in node.kwargs})

    def _known(self, arg: Argument) -> Argument:
        if isinstance(arg, Value):
            return self.now.get(arg.name, arg)
        return tuple(map(self._known, arg)) if isinstance(arg, tuple) else arg

    def _product(self, node: Node) -> Value:
        equation = str(node.args[0])
        terms, result = equation.split("->", maxsplit=1)[0].split(","), equation.split("->")[1]
        agreed = self._agreed(node, terms, result)
        fresh = iter(sorted(set(string.ascii_lowercase) - set(equation)))
        letters = {
            letter: letter if len(sizes) == 1 else "".join(next(fresh) for _ in sizes)
            for letter, sizes in agreed.items()
        }
        operands = []
        for term, value in zip(terms, node.inputs, strict=True):
            known = self.now.get(value.name, value)
            operands.append(self.writer.view(known, [size for letter in term for size in agreed[letter]]))
        written = "->".join(("".join(letters.get(letter, letter) for letter in part)) for part in equation.split("->"))
        return self.writer.view(self.writer.einsum(written, *operands), node.outputs[0].shape)

    def _agreed(self, node: Node, terms: Sequence[str], result: str) -> Mapping[str, Sizes]:
        """The sizes to write for each letter: those behind it where all that have it agree, else its own."""
        offers: dict[str, set[Sizes]] = {}
        sizes: dict[str, int] = {}
        for term, value in zip(terms, node.inputs, strict=True):
            sizes.update(zip(term, value.shape, strict=True))
            _offer(offers, term, self._behind(value))
        for groups in self._ahead(node.outputs[0]):
            _offer(offers, result, groups)
        return {letter: next(iter(found)) if len(found) == 1 else (sizes[letter],) for letter, found in offers.items()}

    def _behind(self, value: Value) -> list[Sizes]:
        """What an operand was before it was flattened."""
        maker = self.makers.get(value.name)
        if maker is not None and maker.op == VIEW and (groups := factors(value.shape, maker.inputs[0].shape)):
            return groups
        return [(size,) for size in value.shape]

    def _ahead(self, value: Value) -> Iterator[list[Sizes]]:
        """What each user makes of a result."""
        for user in self.users.get(value.name, []):
            groups = factors(value.shape, user.outputs[0].shape) if user.op == VIEW else None
            yield groups or [(size,) for size in value.shape]
        if value.name not in self.users:  # a result of the step
            yield [(size,) for size in value.shape]


def _offer(offers: dict[str, set[Sizes]], term: str, groups: Sequence[Sizes]) -> None:
    for letter, sizes in zip(term, groups, strict=True):
        offers.setdefault(letter, set()).add(sizes)
