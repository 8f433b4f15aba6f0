"""The codecs: error bounds for any numbers, records that stand alone, and what is not finite."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collectives.errors import UsageError
from collectives.quantize import BLOCK, CODECS, MOST_SPREAD, SLACK, TINY, Noise, blocks, find

LEVELS = {"int8": 256, "int4": 16}
HUGE = 3e38

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)
tensors = st.one_of(
    st.lists(numbers, min_size=1, max_size=40).map(torch.tensor),
    st.builds(
        lambda seed, count, scale: torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2.0**scale,
        st.integers(0, 2**32),
        st.integers(1, 3 * BLOCK + 1),
        st.integers(-140, 100),
    ),
)


def through(name: str, values: Tensor, noise: Noise | None = None) -> Tensor:
    """Encode and decode."""
    codec = CODECS[name]
    records = torch.empty(blocks(values.numel()) * codec.record, dtype=torch.uint8)
    codec.encode(values, records, noise)
    decoded = torch.full((values.numel(),), 7.0)
    codec.decode(records, decoded)
    return decoded


def bound(name: str, values: Tensor, rounding: str) -> Tensor:
    """The stated bound of each element's error, fp64."""
    exact = values.double()
    bounds = []
    for block in torch.split(exact, BLOCK):
        if name == "bf16":
            step = 2.0**-7 * block.abs() + 2.0**-133
        else:
            step = ((block.max() - block.min()) / (LEVELS[name] - 1)).expand_as(block)
        bounds.append(step * (0.5 if rounding == "nearest" else 1) + SLACK * block.abs().max() + TINY)
    return torch.cat(bounds)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@settings(max_examples=60, deadline=None)
@given(values=tensors)
def test_errors_are_within_the_stated_bound(name: str, rounding: str, values: Tensor) -> None:
    decoded = through(name, values, Noise(1) if rounding == "stochastic" else None)
    assert ((decoded.double() - values.double()).abs() <= bound(name, values, rounding)).all()


@pytest.mark.parametrize("name", CODECS)
def test_constant_blocks_and_extremes_are_exact(name: str) -> None:
    for value in (0.0, 1.5, -HUGE if name != "bf16" else -(2.0**127), 2.0**-149 if name != "bf16" else 2.0**-133):
        values = torch.full((BLOCK + 3,), value)
        assert torch.equal(through(name, values), values)
        assert torch.equal(through(name, values, Noise(1)), values)


@pytest.mark.parametrize("name", LEVELS)
def test_the_minimum_of_a_block_is_exact_and_its_maximum_nearly(name: str) -> None:
    values = torch.linspace(-3, 5, BLOCK)
    decoded = through(name, values)
    assert decoded[0] == -3
    assert abs(decoded[-1] - 5) <= 8 * SLACK


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("noise", [False, True])
def test_records_do_not_depend_on_their_neighbours(name: str, noise: bool) -> None:
    codec, values = CODECS[name], torch.randn(400 * BLOCK + 5, generator=torch.Generator().manual_seed(1))
    whole = torch.empty(blocks(values.numel()) * codec.record, dtype=torch.uint8)
    codec.encode(values, whole, Noise(5) if noise else None)
    for first, last in ((0, 1), (0, 256), (0, 300), (255, 301), (400, 401)):
        if noise and first:
            continue  # the noise of a later block is another
        part = torch.empty((last - first) * codec.record, dtype=torch.uint8)
        codec.encode(values[first * BLOCK : last * BLOCK], part, Noise(5) if noise else None)
        assert torch.equal(part, whole[first * codec.record : last * codec.record])


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_with_what_is_not_finite_is_nan_throughout(name: str, noise: bool, bad: float) -> None:
    values = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(1))
    clean = through(name, values, Noise(1) if noise else None)
    values[BLOCK + 17] = bad
    decoded = through(name, values, Noise(1) if noise else None)
    assert decoded[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.equal(decoded[:BLOCK], clean[:BLOCK])
    assert torch.equal(decoded[2 * BLOCK :], clean[2 * BLOCK :])
    assert len(set(decoded.view(torch.int32)[BLOCK : 2 * BLOCK].tolist())) == 1, "the NaN has one bit pattern"


@pytest.mark.parametrize("name", LEVELS)
def test_a_spread_beyond_fp32_is_nan_and_not_garbage(name: str) -> None:
    values = torch.zeros(2 * BLOCK)
    values[0], values[1] = HUGE, -HUGE
    assert through(name, values)[:BLOCK].isnan().all()
    values[0], values[1] = MOST_SPREAD / 2, -MOST_SPREAD / 2
    assert through(name, values).isfinite().all()


@pytest.mark.parametrize("noise", [False, True])
def test_bf16_keeps_what_is_not_finite_in_place(noise: bool) -> None:
    values = torch.tensor([1.0, math.inf, -math.inf, math.nan, 2.0])
    decoded = through("bf16", values, Noise(1) if noise else None)
    assert torch.equal(decoded[[0, 1, 2, 4]], values[[0, 1, 2, 4]])
    assert decoded[3].isnan()


@pytest.mark.parametrize("name", CODECS)
def test_stochastic_rounding_is_unbiased_and_follows_its_key(name: str) -> None:
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(2))
    rounds = 400
    drawn = torch.stack([through(name, values, Noise(part, 3, 1, "main")) for part in range(rounds)]).double()
    assert torch.equal(drawn[7].float(), through(name, values, Noise(7, 3, 1, "main")))
    step = 2 * bound(name, values, "nearest")
    # Six standard deviations of a mean whose single value has at most half a step of standard deviation.
    assert ((drawn.mean(0) - values.double()).abs() <= 6 * step / 2 / rounds**0.5).all()
    keys = [(0, 3, 1, "main"), (0, 4, 1, "main"), (0, 3, 2, "main"), (0, 3, 1, "other")]
    assert len({through(name, values, Noise(*key)).numpy().tobytes() for key in keys}) == len(keys)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_encoded_as_single(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(BLOCK + 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(through(name, values), through(name, values.float()))


def test_bytes_an_element_are_those_of_the_table() -> None:
    assert {name: codec.record / BLOCK for name, codec in CODECS.items()} == {
        "int8": 1.03125,
        "int4": 0.53125,
        "bf16": 2.0,
    }


def test_unknown_names_are_refused() -> None:
    for codec, rounding in product(("int8", "fp4"), ("nearest", "down")):
        if (codec, rounding) != ("int8", "nearest"):
            with pytest.raises(UsageError, match="must be one of"):
                find(codec, rounding)
