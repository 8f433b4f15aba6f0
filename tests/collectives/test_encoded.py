"""The schedule of encoded all-reduces: proven, balanced, and run by the engine's rules with kernels that count."""

from itertools import pairwise, product

import pytest

from collectives.algorithms import encoded
from collectives.verify import verify

SIZES = ((264, 264), (17416, 4104), (8, 4))
"""Bytes of a record, up and down."""


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("blocks", [0, 1, 2, 7, 3000])
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_the_same_copies_of_what_was_combined_from_all(
    world: int, blocks: int, size: tuple[int, int]
) -> None:
    schedule = encoded.all_reduce(world, blocks, *size)
    verify(schedule)
    assert schedule is encoded.all_reduce(world, blocks, *size)
    assert {schedule.wanted(rank) for rank in range(world)} == {schedule.wanted(0)}
    assert sum(stop - start for start, stop in schedule.wanted(0)) == blocks * size[1]


@pytest.mark.parametrize(("world", "blocks"), [*product([1, 2, 5], [1, 4, 3000])])
def test_pieces_cover_all_blocks_in_order_and_slots_do_not_overlap(world: int, blocks: int) -> None:
    up, down = SIZES[1]
    cut = encoded.pieces(world, blocks, up)
    assert [piece.first for piece in cut] == [0, *(piece.last for piece in cut[:-1])]
    assert cut[-1].last == blocks
    slots = [piece.slot(rank, up) for piece in cut for rank in range(world)]
    assert slots[0][0] == 0
    assert slots[-1][1] == blocks * up * world
    assert all(one[1] == other[0] for one, other in pairwise(slots))
    for piece in cut:
        start, stop = piece.result(up, down)
        low, high = piece.slot(piece.rank, up)
        assert low == start < stop <= high
        assert (piece.last - piece.first) * up <= max(up, encoded.PIECE)


def test_each_rank_sends_its_part_of_the_least_possible() -> None:
    world, blocks, (up, down) = 4, 4000, SIZES[1]
    schedule = encoded.all_reduce(world, blocks, up, down)
    for rank in range(world):
        sent = sum(send.stop - send.start for step in schedule.local(rank).steps for send in step.sends)
        assert sent == (world - 1) * blocks // world * (up + down)
        held = sum(stop - start for start, stop in schedule.held(rank))
        assert held == blocks * up


def test_a_kernel_combines_all_slots_of_one_piece() -> None:
    schedule = encoded.all_reduce(3, 3000, 264, 264)
    computes = [compute for step in schedule.local(1).steps for compute in step.computes]
    mine = [piece for piece in encoded.pieces(3, 3000, 264) if piece.rank == 1]
    assert [compute.kernel for compute in computes] == [encoded.kernel(piece.number) for piece in mine]
    assert [(c.start, c.stop) for c in computes] == [(p.slot(0, 264)[0], p.slot(2, 264)[1]) for p in mine]
    assert not any(compute.elementwise for compute in computes)
