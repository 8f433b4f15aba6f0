"""Split tokens give what unsplit ones do, forward and backward; a split that does not pay is not made."""

import itertools

import pytest
import torch

from collectives.algorithms.weave import weave
from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.topology import Link, flat
from collectives.verify import verify
from parallel.overlap import Load, WovenShape, WovenStack, choose_split, predict
from tests.harness.residents import Residents
from tests.parallel import overlap_programs as programs


@pytest.mark.parametrize("world", [2, 3])
def test_any_split_is_the_unsplit_stack(world: int) -> None:
    with Residents(world, transport="sockets") as group:
        for found in group.run(programs.largest_errors, points=[0, 1, 4, 7, 9]):
            assert max(found) <= 1e-12


def test_a_split_alone_changes_nothing() -> None:
    stack = WovenStack(programs.SHAPE, Communicator.solo(), torch.float64)
    whole, parts = programs.passed(stack, 9), programs.passed(stack, 2)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world, rows", [(1, 3), (2, 1), (3, 8), (4, 2), (5, 17)])
def test_weaves_are_proven(world: int, rows: int) -> None:
    verify(weave(world, rows, 4))


def test_a_chosen_split_never_loses_and_pays_where_it_should() -> None:
    shape, gains = WovenShape(256, 4, 1024, 4), []
    for world, tokens, fixed, each, rate in itertools.product(
        (2, 4), (1, 2, 7, 64, 1000), (0.0, 1e-4), (1e-6, 1e-5), (1e8, 1e9)
    ):
        load, network = Load(fixed, each), flat(world, Link(2e-5, rate))
        whole = predict(shape, tokens, tokens, world, load, network)
        chosen = predict(shape, tokens, choose_split(shape, tokens, world, load, network), world, load, network)
        assert chosen <= 1.02 * whole
        gains.append(whole / chosen)
    assert max(gains) > 1.5
    assert choose_split(shape, 2, 2, Load(1e-3, 1e-6), flat(2, Link(1e-3, 1e9))) == 2


def test_misuse_is_refused() -> None:
    solo = Communicator.solo()
    with pytest.raises(UsageError, match="heads must divide"):
        WovenStack(WovenShape(10, 3, 4, 1), solo)
    with pytest.raises(UsageError, match="fp32 or fp64"):
        WovenStack(programs.SHAPE, solo, torch.bfloat16)
    with pytest.raises(UsageError, match="a split after 5 tokens of 4"):
        WovenStack(programs.SHAPE, solo, torch.float64)(torch.zeros(1, 4, 12, dtype=torch.float64), 5)
