"""A plan moves every chunk to everybody who lacks it, in bounded rounds, evenly; proven as schedules."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from collectives.transfer import plan_rounds
from collectives.verify import verify
from tests.collectives.states import QUICK


@st.composite
def demands(draw: st.DrawFn) -> tuple[list[int], np.ndarray, list[int], int]:
    """Sizes of chunks, who lacks which, who gives, and the limit of a round."""
    world = draw(st.integers(2, 6))
    givers = sorted(draw(st.sets(st.integers(0, world - 1), min_size=1, max_size=world - 1)))
    sizes = draw(st.lists(st.integers(1, 50), max_size=12))
    lacking = np.array(
        draw(
            st.lists(st.lists(st.booleans(), min_size=world, max_size=world), min_size=len(sizes), max_size=len(sizes))
        ),
        dtype=np.bool_,
    )
    lacking = lacking.reshape(len(sizes), world).T.copy()
    lacking[givers] = False
    return sizes, lacking, givers, draw(st.integers(1, 120))


@QUICK
@given(demands(), st.data())
def test_every_chunk_comes_to_everybody_who_lacks_it(
    demand: tuple[list[int], np.ndarray, list[int], int], data: st.DataObject
) -> None:
    sizes, lacking, givers, limit = demand
    pairs = [(giver, chunk) for giver in givers for chunk in range(len(sizes))]
    failures = data.draw(st.dictionaries(st.sampled_from(pairs), st.integers(1, 2))) if pairs else {}
    came: Counter[tuple[int, int]] = Counter()
    moved = 0
    for one in plan_rounds(sizes, lacking, givers, failures, limit):
        schedule = one.schedule(len(lacking))
        verify(schedule)
        chunks = [chunk for route in one.routes for chunk in route.chunks]
        assert one.count == sum(sizes[chunk] for chunk in chunks)
        assert one.count <= limit or len(chunks) == 1
        moved += sum(int((schedule.step(i).stop - schedule.step(i).start).sum()) for i in range(len(schedule)))
        for route in one.routes:
            assert route.giver in givers
            assert route.stop - route.start == sum(sizes[chunk] for chunk in route.chunks)
            for rank in route.takers:
                assert (route.start, route.stop) in schedule.wanted(rank)
                came.update((rank, chunk) for chunk in route.chunks)
            for chunk in route.chunks:
                least = min(failures.get((giver, chunk), 0) for giver in givers)
                assert failures.get((route.giver, chunk), 0) == least
    assert came == Counter((rank, chunk) for rank, chunk in np.argwhere(lacking).tolist())
    assert moved == sum(sizes[chunk] for _, chunk in came)


def test_givers_give_alike() -> None:
    lacking = np.zeros((5, 100), dtype=np.bool_)
    lacking[3:] = True
    given_by: Counter[int] = Counter()
    passed_on: Counter[int] = Counter()
    for one in plan_rounds([10] * 100, lacking, [0, 1, 2], {}, 200):
        for route in one.routes:
            given_by[route.giver] += route.stop - route.start
            for taker in route.takers[:-1]:
                passed_on[taker] += route.stop - route.start
    assert max(given_by.values()) - min(given_by.values()) <= 10
    assert set(passed_on) == {3, 4}


def test_a_chunk_that_failed_goes_down_another_chain() -> None:
    lacking = np.array([[False], [True], [True], [True]])
    chains = set()
    for failed in range(3):
        (one,) = plan_rounds([5], lacking, [0], {(0, 0): failed})
        chains.add(one.routes[0].takers)
    assert chains == {(1, 2, 3), (2, 3, 1), (3, 1, 2)}
