"""Products of matrices and tensors, all written as `einsum`.

A letter that is split in every operand that has it is split in the result, or, where it is summed over, leaves partial
sums. Column, row, batch and token parallelism are all this one rule.
"""

from collections.abc import Iterator

from parallel.graph import Node
from parallel.signatures.signature import Signature
from parallel.signatures.table import P, enter, linear, may_split, moved


def letters(node: Node) -> tuple[list[str], str]:
    """The letters of each operand, and of the result."""
    left, _, right = str(node.args[0]).partition("->")
    return left.split(","), right


def _rule(node: Node, parts: int) -> Iterator[Signature]:
    terms, result = letters(node)
    sizes = {
        letter: size
        for term, value in zip(terms, node.inputs, strict=True)
        for letter, size in zip(term, value.shape, strict=True)
    }
    for letter, size in sizes.items():
        if may_split(size, parts):
            inputs = [term.index(letter) if letter in term else None for term in terms]
            yield moved(node, inputs, [result.index(letter) if letter in result else P])
    yield from linear(node, "p.", ".p")


enter("products", ["einsum.default"], _rule)
