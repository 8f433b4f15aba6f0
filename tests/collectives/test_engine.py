"""The engine in real processes: every algorithm, dtype and size gives exactly what arithmetic says."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from collectives.engine import PROBES
from collectives.region import split
from tests.collectives.crew import KINDS, Crew, crew_of, digest, values_of

DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8")
COUNTS = (1, 3, 1000, 40_001)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with crew_of(5) as made:
        yield made


@pytest.fixture(scope="module", params=list(product(KINDS, (2, 3, 4, 5))), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def world(request: pytest.FixtureRequest, crew: Crew) -> int:
    kind, size = request.param
    crew.connect(size, kind)
    assert isinstance(size, int)
    return size


def reduced(world: int, count: int, dtype: str, op: str = "sum") -> torch.Tensor:
    """What all ranks together give, in a dtype that holds it exactly."""
    values = [values_of(rank, count, getattr(torch, dtype)).to(torch.float64) for rank in range(world)]
    result: torch.Tensor = values[0]
    for value in values[1:]:
        match op:
            case "sum":
                result = result + value
            case "prod":
                result = result * value
            case "min":
                result = torch.minimum(result, value)
            case "max":
                result = torch.maximum(result, value)
    return result


def run(crew: Crew, world: int, **case: Any) -> list[str]:
    """The digest of each rank's result."""
    case.setdefault("dtype", "float32")
    return [result for result, _ in crew.run("collective", world, case=case)]


@pytest.mark.parametrize("algorithm", ["ring", "bidirectional", "doubling"])
def test_all_reduce_is_exact_for_every_dtype_and_size(crew: Crew, world: int, algorithm: str) -> None:
    for dtype, count in product(DTYPES, COUNTS):
        expected = digest(reduced(world, count, dtype))
        results = run(
            crew, world, algorithm=algorithm, kind="all_reduce", count=count, dtype=dtype, segment=32_000, note=16_000
        )
        for rank, result in enumerate(results):
            assert result == expected, (dtype, count, rank)


@pytest.mark.parametrize("algorithm", ["ring", "bidirectional"])
def test_reduce_scatter_leaves_each_rank_its_chunk(crew: Crew, world: int, algorithm: str) -> None:
    for dtype, count in product(("float32", "float16", "uint8"), COUNTS):
        expected = reduced(world, count, dtype)
        results = run(crew, world, algorithm=algorithm, kind="reduce_scatter", count=count, dtype=dtype, note=8192)
        for rank, (start, stop) in enumerate(split(count, world)):
            assert results[rank] == digest(expected[start:stop]), (dtype, count, rank)


@pytest.mark.parametrize("algorithm", ["ring", "bidirectional"])
def test_all_gather_puts_the_chunks_together(crew: Crew, world: int, algorithm: str) -> None:
    for dtype, count in product(("float32", "bfloat16", "int64"), COUNTS):
        parts = [
            values_of(rank, count, torch.float64)[start:stop] for rank, (start, stop) in enumerate(split(count, world))
        ]
        for result in run(crew, world, algorithm=algorithm, kind="all_gather", count=count, dtype=dtype, note=8192):
            assert result == digest(torch.cat(parts)), (dtype, count)


@pytest.mark.parametrize("algorithm", ["ring", "bidirectional"])
def test_broadcast_gives_everybody_what_the_root_holds(crew: Crew, world: int, algorithm: str) -> None:
    for dtype, count in product(("float32", "uint8"), COUNTS):
        for root in (0, world - 1):
            case = {"algorithm": algorithm, "kind": "broadcast", "count": count, "dtype": dtype, "note": 8192}
            expected = digest(values_of(root, count, torch.float64))
            for result in run(crew, world, **case, arguments={"root": root}):
                assert result == expected, (dtype, count, root)


def test_large_transfers_go_as_bulk_in_many_segments(crew: Crew, world: int) -> None:
    for algorithm, window in (("ring", 1), ("ring", 6), ("bidirectional", 3), ("doubling", 2)):
        count = 1_500_000 + world
        expected = digest(reduced(world, count, "float32"))
        case = {"algorithm": algorithm, "kind": "all_reduce", "count": count, "segment": 300_000, "window": window}
        for result in run(crew, world, **case):
            assert result == expected, (algorithm, window)


@pytest.mark.parametrize("op", ["min", "max", "prod"])
def test_every_reduction(crew: Crew, world: int, op: str) -> None:
    for dtype, algorithm in product(("float32", "bfloat16", "int32"), ("ring", "doubling")):
        expected = digest(reduced(world, 1000, dtype, op))
        for result in run(crew, world, algorithm=algorithm, kind="all_reduce", count=1000, dtype=dtype, op=op):
            assert result == expected, (dtype, algorithm)


@pytest.mark.parametrize("op", ["sum", "min", "max"])
def test_all_ranks_get_the_same_bits_where_the_operation_does_not_commute_to_the_bit(
    crew: Crew, world: int, op: str
) -> None:
    for algorithm in ("ring", "doubling"):
        case = {"algorithm": algorithm, "kind": "all_reduce", "count": 999, "dtype": "float32", "op": op, "odd": True}
        assert len(set(run(crew, world, **case))) == 1, algorithm


@pytest.mark.parametrize("algorithm", ["ring", "bidirectional", "doubling"])
def test_a_finishing_kernel_runs_once_on_every_element(crew: Crew, world: int, algorithm: str) -> None:
    for count in (3, 400_000):
        case = {"algorithm": algorithm, "kind": "all_reduce", "count": count, "arguments": {"finish": True}}
        expected = digest(3 * reduced(world, count, "float32"))
        for result in run(crew, world, **case, note=2**16):
            assert result == expected, count


def test_what_never_leaves_the_callers_tensor_need_not_be_copied(crew: Crew, world: int) -> None:
    for kind, count in product(("all_gather", "broadcast"), (1000, 300_000)):
        arguments = {"root": 0} if kind == "broadcast" else {}
        case = {"algorithm": "ring", "kind": kind, "count": count, "arguments": arguments}
        assert run(crew, world, **case, lift=False) == run(crew, world, **case), (kind, count)


def test_lanes_run_side_by_side(crew: Crew, world: int) -> None:
    case = {"algorithm": "ring", "kind": "all_reduce", "count": 200_000, "dtype": "float32", "note": 2**16}
    for same in crew.run("lanes", world, case=case, channels=[7, 8, 9], times=4):
        assert all(same)


def test_probes_tell_where_the_engine_is(crew: Crew, world: int) -> None:
    case = {"algorithm": "ring", "kind": "all_reduce", "count": 60, "dtype": "float32"}
    for _, points in crew.run("collective", world, case=case):
        assert points[0] == PROBES[0]
        assert points[-1] == PROBES[-1]
        assert points.count("reduce") == world - 1
        assert points.count("transfer") == 2 * (world - 1)


def test_the_barrier_of_notifications_ends(crew: Crew, world: int) -> None:
    # its schedule takes no count: the engine sees empty ranges only
    assert crew.run("barrier", world) == [None] * world
