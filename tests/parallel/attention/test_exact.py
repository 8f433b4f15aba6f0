"""Every scheme, balance and kind of heads against torch's attention: values, gradients, coverage, precision."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.algorithms.sequence import Attend, colour
from collectives.communicator import Communicator
from collectives.cutting import Cutting
from collectives.errors import UsageError
from collectives.program import compile_program
from collectives.verify import verify
from parallel.attention import SequenceAttention, local, sequence_attention
from parallel.attention.choice import scores
from parallel.attention.layout import SCHEMES, Problem, layout
from parallel.attention.local import attend
from parallel.attention.merge import merge
from parallel.attention.shares import Balance, Share, Tile, shard, tiles, unshard
from tests.parallel.attention.played import reference, replicated, solve, whole

SCALE = 0.3


class Case(NamedTuple):
    """One problem: heads, heads of keys, queries, keys; the documents are of both."""

    world: int
    scheme: str
    balance: str
    causal: bool
    heads: tuple[int, int]
    rows: tuple[int, int]
    parts: int = 1
    columns: int = 1
    documents: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    batch: int = 2

    def problem(self) -> Problem:
        balance = Balance(self.balance, self.documents)
        queries = balance.shares(self.rows[0], self.world)
        if self.scheme == "tree":
            queries = replicated(self.rows[0], self.world)
        keys = balance.shares(self.rows[1], self.world)
        shape = (self.batch, *self.heads, 4, self.dtype)
        return Problem(*shape, queries, keys, self.causal, SCALE, self.scheme, self.columns, self.parts)

    def tensors(self) -> list[Tensor]:
        chance = torch.Generator().manual_seed(7)
        heads, rows = (self.heads[0], self.heads[1]), self.rows
        shapes = [(heads[0], rows[0]), (heads[1], rows[1]), (heads[1], rows[1]), (heads[0], rows[0])]
        return [torch.randn(self.batch, *s, 4, generator=chance, dtype=torch.float64).to(self.dtype) for s in shapes]

    def solved(self) -> list[Tensor]:
        """Out and gradients of the whole, by all ranks."""
        balance, everywhere = Balance(self.balance, self.documents), self.scheme == "tree"
        q, k, v, grad = self.tensors()

        def spread(tensor: Tensor) -> list[Tensor]:
            return [shard(tensor, balance, self.world, rank) for rank in range(self.world)]

        queries, grads = ([t] * self.world if everywhere else spread(t) for t in (q, grad))
        found = solve(self.problem(), queries, list(zip(spread(k), spread(v), strict=True)), grads)
        if not everywhere:
            return whole(found, balance, balance)
        for mine in found[1:]:
            assert torch.equal(mine[0], found[0][0]) and torch.equal(mine[2], found[0][2])
        return [found[0][0], found[0][2], *(unshard([mine[n] for mine in found], balance) for n in (3, 4))]


def matrix(worlds: tuple[int, ...]) -> Iterator[Case]:
    shapes = itertools.cycle([((4, 4), (37, 37)), ((6, 2), (19, 50)), ((5, 1), (23, 9)), ((4, 2), (16, 16))])
    parts = itertools.cycle([1, 3, 2])
    for world, scheme, balance, causal in itertools.product(
        worlds, SCHEMES, ("contiguous", "zigzag", "striped"), (False, True)
    ):
        heads, rows = next(shapes)
        columns = [n for n in range(2, world + 1) if world % n == 0 and scheme in ("hybrid", "usp")]
        for width in columns or [1]:
            yield Case(world, scheme, balance, causal, heads, rows, next(parts), width)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_all_ranks_together_compute_what_one_process_does(world: int) -> None:
    cases = list(matrix((world,)))
    for case in cases if world < 8 else cases[::5]:
        due = reference(case.tensors(), case.causal, SCALE)
        for got, right in zip(case.solved(), due, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-12, msg=str(case))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "tree"])
def test_packed_documents_attend_within_themselves(scheme: str) -> None:
    documents = (5, 17, 0, 3, 12)
    for balance, causal in itertools.product(("contiguous", "zigzag", "striped"), (False, True)):
        case = Case(4, scheme, balance, causal, (4, 2), (37, 37), 2, 2, documents, batch=1)
        due = reference(case.tensors(), causal, SCALE, documents)
        for got, right in zip(case.solved(), due, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-12, msg=str(case))


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 2.0), (torch.bfloat16, 1.1), (torch.float16, 1.1)])
def test_errors_are_about_those_of_one_process(dtype: torch.dtype, allowed: float) -> None:
    for scheme, causal in itertools.product(SCHEMES, (False, True)):
        case = Case(4, scheme, "zigzag", causal, (4, 2), (96, 96), 2, 2, dtype=dtype)
        given = case.tensors()
        exact = reference([tensor.double() for tensor in given], causal, SCALE)
        single = reference(given, causal, SCALE)
        for got, alone, right in zip(case.solved(), single, exact, strict=True):
            ours, theirs = (float((t.to(dtype).double() - right).abs().mean()) for t in (got, alone))
            assert ours <= allowed * theirs, (scheme, causal, ours, theirs)


def test_schedules_are_proven() -> None:
    """What timing could change is refused by `verify`; that nothing is left out or done twice is counted here."""
    for case in matrix((3, 4)):
        for backward in (False, True):
            plan = layout(case.problem(), backward)
            verify(plan.schedule)
            seen: Counter[tuple[int, int]] = Counter()
            for task in plan.tasks.values():
                if isinstance(task, Attend):
                    seen[task.q.owner, task.kv.owner] += scores(plan, task)
            rows = case.rows
            every = sum(min(row + 1, rows[1]) for row in range(rows[0])) if case.causal else rows[0] * rows[1]
            assert sum(seen.values()) == every * case.problem().head_ranks, case


@pytest.mark.parametrize("scheme", ["ring", "token_ring"])
def test_zigzag_moves_three_quarters_and_gives_all_the_same_work_at_each_step(scheme: str) -> None:
    world, rows = 4, 64
    case = Case(world, scheme, "zigzag", True, (2, 2), (rows, rows))
    moved = [volume(one.problem()) for one in (case, case._replace(causal=False, balance="contiguous"))]
    assert moved[0] == 0.75 * moved[1]
    plan = layout(case.problem())
    work: Counter[tuple[int, int]] = Counter()
    for index in range(len(plan.schedule)):
        computes = plan.schedule.step(index).computes
        for rank, kernel in zip(computes.rank.tolist(), computes.kernel.tolist(), strict=True):
            task = plan.tasks[plan.schedule.kernels[kernel]]
            if isinstance(task, Attend):
                turn = (task.q.owner - task.kv.owner) % world
                work[turn, rank] += scores(plan, task)
    each = rows // world
    for turn in range(1, world):
        assert {work[turn, rank] for rank in range(world)} == {each * each // 2}


def volume(problem: Problem) -> int:
    schedule = layout(problem).schedule
    steps = (schedule.step(index) for index in range(len(schedule)))
    return sum(int((step.stop - step.start).sum()) for step in steps)


@pytest.mark.parametrize("balance", ["contiguous", "zigzag", "striped"])
def test_tiles_are_the_mask(balance: str) -> None:
    documents = (6, 0, 9, 4)
    for (length, docs), causal in itertools.product(((19, documents), (21, ())), (False, True)):
        spread = Balance(balance, docs)
        shares = spread.shares(length, 3)
        number = torch.repeat_interleave(torch.arange(len(docs or (1,))), torch.tensor(docs or (length,)))
        mask = number[:, None] == number[None, :]
        mask = mask.tril() if causal else mask
        for a, b in itertools.product(range(3), repeat=2):
            made = torch.zeros(shares[a].rows, shares[b].rows, dtype=torch.int64)
            for tile in tiles(shares[a], 0, shares[a].rows, shares[b], 0, shares[b].rows, causal):
                part = torch.ones(tile.q1 - tile.q0, tile.k1 - tile.k0, dtype=torch.int64)
                part = part.tril() if tile.causal else part
                assert int(part.sum()) == tile.scores
                made[tile.q0 : tile.q1, tile.k0 : tile.k1] += part
            rows, columns = spread.indices(length, 3, a), spread.indices(length, 3, b)
            assert torch.equal(made, mask[rows][:, columns].long())


def test_rows_that_see_nothing_are_zero_and_minus_infinity() -> None:
    q = torch.randn(1, 2, 5, 4)
    out, lse = torch.full((1, 2, 5, 4), torch.nan), torch.full((1, 2, 5), torch.nan)
    attend(q, q, q, [Tile(2, 5, 0, 3, False)], 1.0, out, lse, first=True)
    assert (out[:, :, :2] == 0).all() and torch.isneginf(lse[:, :, :2]).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[:, :, 2:]).all()
    nothing, never = torch.zeros(1, 2, 5, 4), torch.full((1, 2, 5), -torch.inf)
    before = out.clone()
    merge(out, lse, nothing, never)
    assert torch.equal(out, before)
    merge(nothing, never, torch.zeros_like(nothing), torch.full_like(never, -torch.inf))
    assert (nothing == 0).all() and torch.isneginf(never).all()
    merge(nothing, never, out, lse)
    assert torch.equal(nothing, out) and torch.equal(never, lse)


@pytest.mark.parametrize("scheme", ["ring", "token_ring", "tree"])
def test_holders_of_nothing_and_uneven_ones(scheme: str) -> None:
    rows = (7, 0, 20, 1)
    q, k, v, grad = Case(4, scheme, "contiguous", False, (4, 2), (28, 28)).tensors()
    keys = uneven(rows)
    everywhere = scheme == "tree"
    problem = Problem(2, 4, 2, 4, torch.float64, replicated(28, 4) if everywhere else keys, keys, False, SCALE, scheme)
    cut: Callable[[Tensor], list[Tensor]] = lambda tensor: list(torch.split(tensor, list(rows), 2))  # noqa: E731
    queries, grads = ([t] * 4 if everywhere else cut(t) for t in (q, grad))
    found = solve(problem, queries, list(zip(cut(k), cut(v), strict=True)), grads)
    due = reference((q, k, v, grad), False, SCALE)
    out = found[0][0] if everywhere else torch.cat([mine[0] for mine in found], 2)
    torch.testing.assert_close(out, due[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([mine[3] for mine in found], 2), due[2], rtol=0, atol=1e-12)


def uneven(rows: tuple[int, ...]) -> tuple[Share, ...]:
    shares = Balance().shares(sum(rows), 1)[0].runs[0]
    starts = itertools.accumulate((0, *rows[:-1]))
    return tuple(
        Share((shares._replace(length=count, position=start),), (count,))
        for start, count in zip(starts, rows, strict=True)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_of_a_kind_is_an_input_too(scheme: str) -> None:
    """No sequences, no queries, no keys, on four ranks, and heads that are fewer than these."""
    for heads, rows, batch in (((4, 2), (8, 8), 0), ((4, 2), (0, 5), 1), ((3, 1), (2, 0), 1)):
        case = Case(4, scheme, "zigzag", True, heads, rows, 2, 2, batch=batch)
        q, k, v, _ = case.tensors()
        for got, like in zip(case.solved(), (q, q, k, v), strict=True):
            assert got.shape == like.shape and not got.any()


@pytest.mark.parametrize("balance", ["contiguous", "zigzag", "striped"])
def test_many_queries_are_computed_with_a_part_at_a_time(balance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ROWS", 3)
    for causal in (False, True):
        case = Case(2, "ring", balance, causal, (4, 2), (23, 31), 2)
        for got, right in zip(case.solved(), reference(case.tensors(), causal, SCALE), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", ["ring", "bidirectional", "token_ring", "token_ring_relay"])
def test_memory_for_what_travels_does_not_grow_with_the_ranks(scheme: str) -> None:
    def staging(world: int, backward: bool) -> int:
        problem = Case(world, scheme, "contiguous", False, (4, 4), (64 * world, 64 * world), 4).problem()
        cutting = Cutting(2**20, 2**20, 2**20, 4, False, True, 0, False)
        schedule = layout(problem, backward).schedule
        return max(compile_program(schedule, rank, cutting).footprint for rank in range(world))

    for backward in (False, True):
        few, many = staging(4, backward), staging(8, backward)
        assert 0 < many <= few + 4096  # tokens, and what is there for several hops


def test_neighbours_on_a_circle_have_unlike_colours() -> None:
    for stations, hop in itertools.product(range(2, 13), range(1, 12)):
        if hop % stations:
            given = [colour(place, hop, stations) for place in range(stations)]
            assert all(given[place] != given[(place + hop) % stations] for place in range(stations))
            assert max(given) <= (1 if stations // math.gcd(stations, hop) % 2 == 0 else 2)


def test_strides_and_what_needs_no_gradient() -> None:
    """Views of one projection, an output whose gradient is expanded, and a tensor whose last dimension is not dense."""
    made = torch.randn(2, 7, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = made.permute(2, 0, 3, 1, 4)
    alone = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = sequence_attention(q, k, v, Communicator.solo(), causal=True, scheme="ring")
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(out.sum(), made)[0] for out in (ours, alone)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    slanted = torch.randn(2, 4, 8, 7, dtype=torch.float64).transpose(2, 3)
    right = F.scaled_dot_product_attention(slanted, slanted, slanted)
    found = sequence_attention(slanted, slanted, slanted, Communicator.solo())
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    query, key = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 4)
    sequence_attention(query, key, key, Communicator.solo()).sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None and key.grad is None


def test_it_is_differentiable_once_and_says_so() -> None:
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    out = sequence_attention(q, q, q, Communicator.solo(), scheme="ring")
    (gradient,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


def test_autocast_casts_as_that_of_torch() -> None:
    q, k = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = sequence_attention(q, k, q, Communicator.solo(), scheme="ring")
        assert out.dtype == F.scaled_dot_product_attention(q, k, q).dtype == torch.bfloat16
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None and q.grad.dtype == torch.float32


def test_more_keys_than_queries_are_masked_from_the_top_left() -> None:
    q, k = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 7, 4, dtype=torch.float64)
    right = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(sequence_attention(q, k, k, Communicator.solo(), True), right, rtol=0, atol=1e-12)


def test_lengths_that_are_not_those_of_the_tensors_are_refused() -> None:
    q = torch.zeros(1, 2, 3, 4)
    for lengths, why in ((((4,), (3,)), "4 queries and 3 keys"), (((3, 3), (3, 3)), "name 2 and 2 ranks")):
        with pytest.raises(UsageError, match=why):
            sequence_attention(q, q, q, Communicator.solo(), lengths=lengths)


def test_gradcheck() -> None:
    comm = Communicator.solo()
    q, k, v = (torch.randn(1, heads, 5, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    for causal in (False, True):
        module = SequenceAttention(comm, causal, "ring")
        assert torch.autograd.gradcheck(module, (q, k, v))


def test_the_module_has_its_settings() -> None:
    module = SequenceAttention(Communicator.solo(), causal=True, scheme="ring", balance="zigzag")
    q = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    right = reference((q, q, q, q), True, 0.5)[0]
    order = Balance("zigzag").indices(8, 1, 0)
    assert torch.equal(order, torch.arange(8))
    torch.testing.assert_close(module(q, q, q), right, rtol=0, atol=1e-12)
    assert "zigzag" in repr(module)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"q": (1, 3, 8, 4)}, "must divide"),
        ({"q": (2, 8, 4)}, "takes q"),
        ({"q": (1, 2, 8, 5)}, "head size"),
        ({"q": (1, 0, 8, 4)}, "no heads"),
        ({"q": (1, 2, 8, 0), "k": (1, 2, 8, 0)}, "size 0"),
        ({"dtype": torch.int64}, "floating"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], why: str) -> None:
    shape, dtype = change.get("q", (1, 2, 8, 4)), change.get("dtype", torch.float32)
    q, k = torch.zeros(shape, dtype=dtype), torch.zeros(change.get("k", (1, 2, 8, 4)))  # type: ignore[call-overload]
    with pytest.raises(UsageError, match=why):
        sequence_attention(q, k, k, Communicator.solo())


def test_problems_that_cannot_be_are_refused() -> None:
    good = Case(4, "usp", "zigzag", True, (4, 2), (16, 16), columns=2).problem()
    for change in ({"columns": 3}, {"scheme": "star"}, {"parts": 0}, {"kv_heads": 3}):
        with pytest.raises(UsageError):
            replace(good, **change)
    with pytest.raises(UsageError, match="balance must be"):
        Balance("zagzig")
    with pytest.raises(UsageError, match="begin with 0"):
        Balance.packed([1, 5])
    with pytest.raises(UsageError, match="documents have"):
        Balance.packed([0, 5]).shares(6, 2)
    assert Balance.packed(torch.tensor([0, 5, 5, 9])).documents == (5, 0, 4)
