"""Registered memory: what is taken is apart from all else, another mapping sees it, and it goes back when it goes."""

import gc
import mmap
import os

import pytest
import torch

from collectives.arena import CAPACITY, SMALLEST_EXCHANGE, Arena, MappedArena, process_arena


def resident_pages(arena: Arena) -> int:
    return os.fstat(arena.descriptor).st_blocks * 512 // mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex64])
@pytest.mark.parametrize("count", [1, 1000, 100_003])
def test_a_peer_sees_what_its_owner_wrote(dtype: torch.dtype, count: int) -> None:
    arena = Arena()
    mapped = MappedArena(arena.descriptor)
    first, second = arena.empty(count, dtype), arena.empty(count, dtype)
    first.fill_(1)
    second.fill_(2)
    for tensor, value in ((first, 1), (second, 2)):
        offset = arena.offset(tensor)
        assert offset is not None
        assert torch.equal(mapped.view(offset, tensor), torch.full((count,), value, dtype=dtype))


def test_views_are_registered_and_other_memory_is_not() -> None:
    arena = Arena()
    tensor = arena.empty(100, torch.float64)
    whole, part = arena.offset(tensor), arena.offset(tensor[10:])
    assert whole is not None
    assert part == whole + 80
    assert arena.offset(torch.empty(100)) is None
    assert arena.offset(Arena().empty(100, torch.float64)) is None


def test_memory_goes_back_when_the_last_view_goes() -> None:
    arena = Arena()
    tensors = [arena.empty(50_000, torch.float32).fill_(1) for _ in range(4)]
    view = tensors[2][5:10]
    assert resident_pages(arena) >= 4 * 50_000 * 4 // mmap.PAGESIZE
    starts = [arena.offset(tensor) for tensor in tensors]
    del tensors[1:]
    gc.collect()
    assert view.eq(1).all()
    assert resident_pages(arena) < 3 * 50_000 * 4 // mmap.PAGESIZE
    assert arena.offset(arena.empty(50_000, torch.float32)) == starts[1], "the first gap that is large enough"
    del view, tensors
    gc.collect()
    assert resident_pages(arena) == 0
    assert arena.offset(arena.empty(1, torch.uint8)) == starts[0]


PAGES = 3 * SMALLEST_EXCHANGE


def test_two_tensors_exchange_their_pages_and_peers_see_it() -> None:
    arena = Arena()
    mapped = MappedArena(arena.descriptor)
    tensors = [arena.empty(PAGES + 5, torch.uint8).fill_(value) for value in range(3)]
    offsets = [arena.offset(tensor) for tensor in tensors]
    for one, other in ((0, 1), (1, 2), (0, 2), (0, 1)):
        expected = [int(tensor[0]) for tensor in tensors]
        expected[one], expected[other] = expected[other], expected[one]
        tails = [int(tensor[-1]) for tensor in tensors]
        assert arena.exchange(tensors[one], tensors[other]) == PAGES
        for tensor, value, tail in zip(tensors, expected, tails, strict=True):
            head = tensor[:PAGES]
            assert head.eq(value).all()
            assert tensor[PAGES:].eq(tail).all(), "what is no whole page stays"
            offset = arena.offset(head[4096:])
            assert offset is not None
            assert torch.equal(mapped.view(offset, head[4096:]), head[4096:])
            tensor[7] = value
    assert {arena.offset(tensor[:PAGES]) for tensor in tensors} == set(offsets)
    assert any(arena.offset(tensor) is None for tensor in tensors), "it lies in two pieces"
    del tensors, tensor, head
    gc.collect()
    assert resident_pages(arena) == 0
    again = arena.empty(2 * PAGES, torch.uint8).fill_(9)
    offset = arena.offset(again)  # one piece, where there were several
    assert offset is not None
    assert mapped.view(offset, again).eq(9).all()


def test_nothing_else_is_exchanged() -> None:
    arena = Arena()
    one, other = arena.empty(2 * PAGES, torch.uint8).fill_(1), arena.empty(2 * PAGES, torch.uint8).fill_(2)
    assert arena.exchange(one[:4096], other[:4096]) == 0, "too little"
    assert arena.exchange(one[1 : PAGES + 1], other[1 : PAGES + 1]) == 0, "no pages"
    assert arena.exchange(one[:PAGES], other) == 0, "of another size"
    assert arena.exchange(one[:PAGES], one[4096 : PAGES + 4096]) == 0, "they overlap"
    assert arena.exchange(one, torch.zeros(2 * PAGES, dtype=torch.uint8)) == 0, "ordinary memory"
    assert arena.exchange(one, Arena().empty(2 * PAGES, torch.uint8)) == 0, "another arena"
    assert arena.exchange(one[:PAGES], other[:PAGES]) == PAGES
    assert arena.exchange(one, other) == 0, "in several pieces"
    assert one[PAGES:].eq(1).all()
    assert one[:PAGES].eq(2).all()
    assert other[:PAGES].eq(1).all()


def test_all_memory_in_use_is_said() -> None:
    with pytest.raises(MemoryError, match="registered memory"):
        Arena().empty(CAPACITY + 1, torch.uint8)


def test_a_forked_process_has_an_arena_of_its_own() -> None:
    tensor = process_arena().empty(1, torch.int32).fill_(1)
    child = os.fork()
    if child == 0:
        process_arena().empty(1, torch.int32).fill_(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tensor.item() == 1
