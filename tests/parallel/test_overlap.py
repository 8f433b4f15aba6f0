"""Split tokens give what unsplit ones do, forward and backward; a split that does not pay is not made."""

import itertools

import pytest
import torch

from collectives.algorithms.weave import weave
from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.topology import Link, flat
from collectives.verify import verify
from parallel.overlap import WovenShape, WovenStack
from parallel.split_choice import Load, choose_split, predict, simulated
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


SHAPE = WovenShape(64, 4, 64, 2)


def test_a_chosen_split_never_loses_and_pays_where_it_should() -> None:
    """By the exact simulator, which follows every message, over lengths, links and loads that favour either."""
    gains: list[float] = []
    for tokens, rate, latency, each, fixed in itertools.product(
        (1, 2, 3, 7, 64, 777, 3000), (2e6, 1e9), (1e-5, 1e-3), (1e-6, 1e-4), (0.0, 1e-3)
    ):
        load, network = Load(fixed, each), flat(2, Link(latency, rate))
        chosen = choose_split(SHAPE, tokens, 2, load, network)
        assert chosen == tokens or 0 < chosen < tokens
        times = {point: simulated(SHAPE, tokens, point, 2, load, network) for point in {chosen, tokens}}
        assert times[chosen] <= 1.02 * times[tokens], (tokens, rate, latency, each, fixed)
        gains.append(times[tokens] / times[chosen])
    assert max(gains) > 1.5
    assert gains.count(1.0) > len(gains) // 4, "no case in which a split would have lost"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_the_choice_goes_by_is_what_the_simulator_finds(world: int) -> None:
    network = flat(world, Link(1e-4, 2e6))
    for tokens, each, share in itertools.product((5, 500), (1e-5, 1e-4), (1, 2)):
        case = (SHAPE, tokens, tokens // share, world, Load(1e-3, each), network)
        assert predict(*case) == pytest.approx(simulated(*case), rel=0.03)  # uneven rows


def test_misuse_is_refused() -> None:
    solo = Communicator.solo()
    with pytest.raises(UsageError, match="heads must divide"):
        WovenStack(WovenShape(10, 3, 4, 1), solo)
    with pytest.raises(UsageError, match="fp32 or fp64"):
        WovenStack(programs.SHAPE, solo, torch.bfloat16)
    with pytest.raises(UsageError, match="a split after 5 tokens of 4"):
        WovenStack(programs.SHAPE, solo, torch.float64)(torch.zeros(1, 4, 12, dtype=torch.float64), 5)
