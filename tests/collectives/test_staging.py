"""The pool of work buffers: memory is used again, and never while anybody can still see it."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.arena import Arena
from collectives.staging import PATIENCE, SMALL, StagingPool, copy_out

MANY = 300_000
"""Elements of a buffer that comes from the pool's own memory."""


@pytest.fixture(params=["anonymous", "registered"])
def pool(request: pytest.FixtureRequest) -> StagingPool:
    return StagingPool() if request.param == "anonymous" else StagingPool(Arena().allocate)


def test_memory_is_used_again_once_nobody_refers_to_it(pool: StagingPool) -> None:
    first = pool.take(MANY, torch.float32)
    address = first.data_ptr()
    second = pool.take(MANY, torch.float32)
    assert second.data_ptr() != address
    del first
    assert pool.take(MANY, torch.float32).data_ptr() == address


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda taken: taken[5:10],
    "reshape": lambda taken: taken.view(1000, 300).t(),
    "dtype": lambda taken: taken.view(torch.int32)[7:],
    "numpy": lambda taken: taken.numpy(),
    "memoryview": lambda taken: taken.numpy()[3:].data,
    "graph": lambda taken: (taken * torch.ones(MANY, requires_grad=True)).sum().grad_fn,
    "storage": lambda taken: taken.untyped_storage(),
    "parameter": lambda taken: torch.nn.Parameter(taken[:9]),
}


@pytest.mark.parametrize("hold", list(HOLDERS))
def test_whatever_refers_to_the_memory_keeps_it(pool: StagingPool, hold: str) -> None:
    taken = pool.take(MANY, torch.float32).fill_(1)
    address = taken.data_ptr()
    holder = HOLDERS[hold](taken)
    del taken
    other = pool.take(MANY, torch.float32)
    assert other.data_ptr() != address
    del holder
    gc.collect()
    assert pool.take(MANY, torch.float32).data_ptr() == address


@pytest.mark.parametrize("count", [0, 1, 17, SMALL // 8, MANY, 2_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_buffers_are_flat_aligned_and_of_the_size_asked_for(count: int, dtype: torch.dtype) -> None:
    taken = StagingPool().take(count, dtype)
    assert taken.shape == (count,)
    assert taken.dtype == dtype
    assert taken.is_contiguous()
    assert taken.data_ptr() % 64 == 0
    taken.fill_(1)
    assert bool(taken.eq(1).all())


def test_a_buffer_of_another_dtype_or_a_little_smaller_takes_the_same_memory(pool: StagingPool) -> None:
    address = pool.take(MANY, torch.float32).data_ptr()
    assert pool.take(2 * MANY, torch.bfloat16).data_ptr() == address
    assert pool.take(MANY - 1000, torch.float32).data_ptr() == address


def test_what_is_kept_at_rest_is_bounded_by_the_largest_buffer(pool: StagingPool) -> None:
    for count in (MANY, 2 * MANY, 3 * MANY, 4 * MANY):
        several = [pool.take(count, torch.float32) for _ in range(4)]
        del several
    pool.take(MANY, torch.float32)
    assert 0 < pool.idle_bytes() <= 2 * 1.125 * (4 * MANY * 4)
    for _ in range(PATIENCE + 1):
        pool.take(MANY, torch.float32)
    assert pool.idle_bytes() <= 2 * 1.125 * (MANY * 4), "what nobody asks for any more is given back"


def test_threads_never_share_a_buffer(pool: StagingPool) -> None:
    clashes: list[int] = []

    def work(mark: int) -> None:
        for _ in range(200):
            taken = pool.take(MANY, torch.uint8)
            taken[:100] = mark
            taken[-100:] = mark
            if not bool(taken[:100].eq(mark).all() and taken[-100:].eq(mark).all()):
                clashes.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(6, dtype=torch.float32),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(3, 2, dtype=torch.float64).t(),
        torch.zeros(12, dtype=torch.float32)[::2],
        torch.zeros(2, 3, dtype=torch.complex64).conj(),
        torch.zeros(6, dtype=torch.float32, requires_grad=True),
    ],
    ids=["flat", "bfloat16", "transposed", "strided", "conjugate", "leaf"],
)
def test_copying_out_fills_any_tensor(target: Tensor) -> None:
    for dtype in (torch.float32, target.dtype):
        version = target._version
        copy_out(torch.arange(1, 7).to(dtype), target)
        assert target.detach().reshape(-1).resolve_conj().tolist() == [1, 2, 3, 4, 5, 6]
        assert target._version > version, "autograd must notice"


def test_copying_out_fills_a_scalar() -> None:
    scalar = torch.zeros(5)[2]
    copy_out(torch.ones(1), scalar)
    assert scalar.item() == 1
