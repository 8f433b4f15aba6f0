"""Exact accumulators: one bit pattern for any partition and order, within the stated bound of the exact sum."""

import math
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collectives.reproducible import BLOCK, WIDTH, Accumulator, accumulator

DTYPES = (torch.float32, torch.float64)
LOWEST = {torch.float32: -149, torch.float64: -1074}
"""Exponent of the smallest number above zero."""


def total(groups: Sequence[Sequence[Tensor]], average: bool = False) -> Tensor:
    """The sum of contributions that members hold in these groups."""
    like = next(one for group in groups for one in group)
    adder, count = accumulator(like.dtype, like.numel()), like.numel()
    slots = torch.empty(len(groups), adder.blocks(count), adder.up, dtype=torch.uint8)
    for slot, group in zip(slots, groups, strict=True):
        adder.encode(group, count, slot.view(-1))
    values = torch.full((count,), 7, dtype=adder.dtype)
    assert adder.decode(adder.combine(slots, average).view(-1), values) == sum(map(len, groups))
    return values.to(like.dtype)


def bits(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def shared_out(contributions: Sequence[Tensor], generator: random.Random) -> list[list[Tensor]]:
    """The contributions in any order, held by any number of members."""
    groups: list[list[Tensor]] = [[] for _ in range(generator.randint(1, 6))]
    for one in generator.sample(list(contributions), len(contributions)):
        generator.choice(groups).append(one)
    return groups


def floats(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Numbers of all magnitudes, often ones that cancel or meet at the boundary of bins."""
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**12, 2.0**-34, 2.0**-35, -(2.0**12), 1.5 * 2.0**-34, 2.0**-149])
    if dtype == torch.float32:
        return st.one_of(few, st.floats(width=32, allow_nan=False, allow_infinity=False))
    return st.one_of(few, st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def sums(draw: st.DrawFn) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
    """Contributions, and two ways to share them out."""
    dtype = draw(st.sampled_from(DTYPES))
    length = draw(st.integers(1, 9))
    row = st.lists(floats(dtype), min_size=length, max_size=length)
    rows = [torch.tensor(values, dtype=dtype) for values in draw(st.lists(row, min_size=1, max_size=7))]
    generator = random.Random(draw(st.integers(0, 2**32)))
    return rows, shared_out(rows, generator), shared_out(rows, generator)


def check_bound(rows: Sequence[Tensor], found: Tensor) -> None:
    """Within n * 2**-46 * max|x| (fp64: 2**-92) and half a unit in the last place of the exact sum."""
    eps, lowest = torch.finfo(found.dtype).eps, LOWEST[found.dtype]
    lost = Fraction(2) ** (-WIDTH if found.dtype == torch.float32 else -2 * WIDTH) * len(rows)
    largest = Fraction(torch.finfo(found.dtype).max)
    for values, result in zip(zip(*(row.tolist() for row in rows), strict=True), found.tolist(), strict=True):
        exact = sum(map(Fraction, values), Fraction())
        slack = lost * max(abs(Fraction(value)) for value in values)
        if not math.isfinite(result):
            assert abs(exact) + slack > largest, (values, result)
            continue
        unit = max(Fraction(2) ** lowest, Fraction(eps) * Fraction(2) ** math.frexp(result)[1] / 2)
        assert abs(Fraction(result) - exact) <= slack + unit / 2 * (1 + Fraction(2) ** -20), (values, result)


@settings(max_examples=300, deadline=None)
@given(case=sums())
def test_any_partition_and_order_gives_one_bit_pattern_near_the_exact_sum(
    case: tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]],
) -> None:
    rows, first, second = case
    alone = total([rows])
    assert bits(alone) == bits(total(first)) == bits(total(second))
    check_bound(rows, alone)
    assert bits(total(first, average=True)) == bits(total(second, average=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_agree_with_fsum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = (3 * BLOCK + 17,)
    rows = [torch.randn(shapes, generator=generator, dtype=torch.float64).to(dtype) for _ in range(9)]
    rows += [-rows[0], rows[1] * 1e-9, rows[2] * 1e9, torch.zeros(shapes, dtype=dtype)]
    found = total([rows])
    exact = [math.fsum(values) for values in zip(*(row.tolist() for row in rows), strict=True)]
    eps, slack = torch.finfo(dtype).eps, 2.0 ** (-46 if dtype == torch.float32 else -92) * len(rows)
    most = torch.stack(rows).abs().amax(0).double()
    difference = (found.double() - torch.tensor(exact, dtype=torch.float64)).abs()
    # fsum is rounded too, to fp64.
    assert (difference <= slack * most + eps * torch.tensor(exact, dtype=torch.float64).abs()).all()
    for seed in range(5):
        assert bits(total(shared_out(rows, random.Random(seed)))) == bits(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cancels_leaves_the_small_ones_whole(dtype: torch.dtype) -> None:
    big, small = torch.full((5,), 2.0**20, dtype=dtype), torch.full((5,), 2.0**-20, dtype=dtype)
    assert torch.equal(total([[big], [small], [-big]]), small)
    assert torch.equal(total([[big, small, -big]], average=True), (small.double() / 3).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_is_broken_by_the_smallest_contribution(dtype: torch.dtype) -> None:
    one, half = torch.ones(3, dtype=dtype), torch.full((3,), torch.finfo(dtype).eps / 2, dtype=dtype)
    tiny = torch.full((3,), 2.0**-40 if dtype == torch.float32 else 2.0**-80, dtype=dtype)
    assert torch.equal(total([[one], [half]]), one)
    assert torch.equal(total([[tiny], [one], [half]]), torch.nextafter(one, one * 2))
    assert torch.equal(total([[half], [-tiny, one]]), one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_give_what_ieee_says_in_any_partition(dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    rows = [
        torch.tensor([inf, -inf, inf, nan, 1.0, inf, torch.finfo(dtype).max], dtype=dtype),
        torch.tensor([1.0, -1.0, -inf, inf, nan, inf, torch.finfo(dtype).max], dtype=dtype),
        torch.tensor([2.0, -inf, 5.0, 6.0, 7.0, 1e30, 0.0], dtype=dtype),
    ]
    want = torch.tensor([inf, -inf, nan, nan, nan, inf, inf], dtype=dtype)
    for seed in range(20):
        found = total(shared_out(rows, random.Random(seed)))
        assert torch.equal(found.nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0))
        assert bits(found) == bits(total([rows]))
    assert total([[torch.tensor([-0.0, 0.0], dtype=dtype)]]).signbit().logical_not().all(), "a zero is +0"


def test_the_quick_way_for_one_bin_and_the_general_way_give_the_same() -> None:
    # An element of another bin makes the whole tile take the general way.
    generator = torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        rows = [torch.randn(64, generator=generator, dtype=dtype) for _ in range(4)]
        quick = total([rows[:2], rows[2:]])
        for row in rows:
            row[-1] = 1e20
        general = total([rows[:2], rows[2:]])
        assert bits(quick[:-1]) == bits(general[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bins_are_as_wide_as_they_say_for_every_exponent(dtype: torch.dtype) -> None:
    adder = accumulator(dtype, 8)
    exponents = torch.arange(LOWEST[dtype], 128 if dtype == torch.float32 else 1024)
    values = torch.ldexp(torch.ones(1, dtype=torch.float64), exponents[exponents >= -1022].double()).to(dtype)
    bins = _bins(adder, values[values >= torch.finfo(dtype).smallest_normal])
    normal = exponents[-len(bins) :]
    assert torch.equal(bins, (normal + adder.lowest) // WIDTH + 1)


def _bins(adder: Accumulator, values: Tensor) -> Tensor:
    """The bin of each value, from its record."""
    padded = torch.cat((values, values.new_zeros(-len(values) % 8)))
    records = torch.empty(len(padded) // 8 * adder.up, dtype=torch.uint8)
    adder.encode([padded], len(padded), records)
    return records.view(-1, adder.up)[:, 8:16].reshape(-1)[: len(values)].long()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_as_single(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randn(100, generator=generator).to(dtype) for _ in range(5)]
    found = total([rows[:3], rows[3:]])
    assert torch.equal(found, torch.stack([row.double() for row in rows]).sum(0).float().to(dtype))


def test_an_average_divides_by_the_contributions_not_by_the_members() -> None:
    rows = [torch.full((3,), float(number)) for number in range(1, 8)]
    assert torch.equal(total([rows[:6], [], rows[6:]], average=True), torch.full((3,), 4.0))


def test_there_is_room_for_as_many_contributions_as_stated() -> None:
    # All of the greatest first digit and of one sign.
    greatest = torch.full((8,), 2.0**12 - 2.0**-11)
    adder = accumulator(torch.float32, 8)
    one = torch.empty(adder.up, dtype=torch.uint8)
    adder.encode([greatest] * 1024, 8, one)
    slots = one.expand(64, 1, -1).contiguous()
    values = torch.empty(8)
    assert adder.decode(adder.combine(slots, average=True).view(-1), values) == 2**16
    assert torch.equal(values, greatest)
