"""Operations that make tensors of nothing. What draws random numbers is done by all ranks alike, with one seed."""

from collections.abc import Iterator

import torch

from parallel.graph import Node
from parallel.signatures.signature import Signature
from parallel.signatures.table import P, enter, moved, sized, splittable


def _full(node: Node, parts: int) -> Iterator[Signature]:
    """Any dimension; zeros are partial sums of zeros."""
    for dim in splittable(node.outputs[0], parts):
        yield moved(node, [], [dim])
    if node.args[1] == 0 and node.outputs[0].dtype != torch.bool:
        yield Signature((), (P,))


def _alike(_node: Node, _parts: int) -> Iterator[Signature]:
    """Nothing but the same on every rank."""
    yield from ()


enter("factories", ["full.default"], _full, sized(0))
enter("factories", ["arange.default", "arange.start", "arange.start_step", "eye.default", "linspace.default"], _alike)
enter(
    "random",
    [
        "bernoulli.default",
        "bernoulli.p",
        "multinomial.default",
        "native_dropout.default",
        "normal_functional.default",
        "rand.default",
        "rand_like.default",
        "randint.default",
        "randint.low",
        "randn.default",
        "randn_like.default",
        "randperm.default",
        "uniform.default",
    ],
    _alike,
)
