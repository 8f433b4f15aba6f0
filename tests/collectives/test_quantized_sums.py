"""Quantized all-reduces of several members in one process: the stated bound for any inputs, and error feedback."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collectives.error_feedback import ErrorFeedback, Residual
from collectives.operations import View
from collectives.operations.quantized import Quantized
from collectives.quantize import BLOCK, SLACK, TINY

LEVELS = {"int8": 256, "int4": 16}


def all_reduce(inputs: list[Tensor], feedback: list[Residual] | None = None, **how: str) -> list[Tensor]:
    """What every member ends with: its operation's plan, run in lockstep by the rules of `collectives.schedule`."""
    world = len(inputs)
    views = [View(1, tuple(range(1, world + 1)), rank) for rank in range(world)]
    operations = [
        Quantized(
            tensor=given,
            lane="main",
            view=view,
            inplace=False,
            feedback=feedback[view.rank] if feedback else None,
            **{"op": "sum", **how},  # type: ignore[arg-type]
        )
        for given, view in zip(inputs, views, strict=True)
    ]
    plans = [operation.plan(view) for operation, view in zip(operations, views, strict=True)]
    schedule = plans[0].schedule
    buffers = [torch.zeros(schedule.count, dtype=torch.uint8) for _ in range(world)]
    for plan, buffer, view in zip(plans, buffers, views, strict=True):
        start = 0
        for low, high in schedule.held(view.rank):
            buffer[low:high] = plan.source[start : start + high - low]
            start += high - low
    for index in range(len(schedule)):
        step = schedule.step(index)
        for src, dst, low, high in zip(*(c.tolist() for c in (step.src, step.dst, step.start, step.stop)), strict=True):
            buffers[dst][low:high] = buffers[src][low:high]
        work = step.computes
        for rank, kernel, low, high in zip(
            *(c.tolist() for c in (work.rank, work.kernel, work.start, work.stop)), strict=True
        ):
            plans[rank].kernels[schedule.kernels[kernel]](buffers[rank][low:high])
    return [
        operation.deliver([buffer[low:high] for low, high in schedule.wanted(view.rank)], view)
        for operation, buffer, view in zip(operations, buffers, views, strict=True)
    ]


def bound(inputs: list[Tensor], op: str, codec: str, rounding: str) -> Tensor:
    """Half the contributions' steps (over the members for an average), and half the step of the result's block."""
    share, members = 0.5 if rounding == "nearest" else 1.0, len(inputs)
    divisor = members if op == "avg" else 1
    bounds = []
    for blocks in zip(*(torch.split(one.double(), BLOCK) for one in inputs), strict=True):
        step = (LEVELS[codec] - 1) ** -1
        first = sum(float(block.max() - block.min()) for block in blocks) * step * share / divisor
        total = torch.stack(blocks).sum(0) / divisor
        largest = sum(float(block.abs().max()) for block in blocks)
        first += (members + 1) * (SLACK * largest + TINY)
        # What is encoded is the sum of decoded blocks, whose spread is wider by the first error on both sides.
        second = (float(total.max() - total.min()) + 2 * first) * step * share
        bounds.append(torch.full_like(total, first + second + 2 * (SLACK * largest + TINY)))
    return torch.cat(bounds)


@st.composite
def contributions(draw: st.DrawFn) -> list[Tensor]:
    """Of one to five members, each of a scale of its own."""
    count = draw(st.integers(1, 5 * BLOCK))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scales = draw(st.lists(st.integers(-60, 60), min_size=1, max_size=5))
    return [torch.randn(count, generator=generator) * 2.0**scale for scale in scales]


@pytest.mark.parametrize("codec", LEVELS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@settings(max_examples=30, deadline=None)
@given(inputs=contributions(), op=st.sampled_from(["sum", "avg"]))
def test_every_member_has_the_same_bits_within_the_bound(
    codec: str, rounding: str, inputs: list[Tensor], op: str
) -> None:
    first, *others = all_reduce(inputs, op=op, codec=codec, rounding=rounding)
    assert all(torch.equal(other, first) for other in others)
    exact = torch.stack([one.double() for one in inputs]).sum(0) / (len(inputs) if op == "avg" else 1)
    assert ((first.double() - exact).abs() <= bound(inputs, op, codec, rounding)).all()


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
def test_a_nan_of_one_member_is_nan_on_all_and_in_its_block_only(codec: str) -> None:
    inputs = [torch.randn(4 * BLOCK, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    inputs[1][BLOCK + 5], inputs[2][3 * BLOCK] = torch.nan, torch.inf
    for result in all_reduce(inputs, codec=codec, rounding="nearest"):
        assert result[:BLOCK].isfinite().all()
        assert result[2 * BLOCK : 3 * BLOCK].isfinite().all()
        if codec == "bf16":
            assert result.isnan().nonzero().tolist() == [[BLOCK + 5]]
            assert result[3 * BLOCK] == torch.inf
        else:
            assert result[BLOCK : 2 * BLOCK].isnan().all()
            assert result[3 * BLOCK :].isnan().all()


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
def test_with_feedback_nothing_is_lost_but_what_is_still_owed(codec: str, op: str) -> None:
    inputs = [torch.randn(3 * BLOCK + 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    exact = torch.stack([one.double() for one in inputs]).sum(0) / (3 if op == "avg" else 1)
    kept = [ErrorFeedback() for _ in inputs]
    total, errors = torch.zeros_like(exact), []
    for step in range(1, 25):
        results = all_reduce(inputs, [feedback.of("w") for feedback in kept], codec=codec, op=op)
        assert all(torch.equal(result, results[0]) for result in results)
        total += results[0].double()
        errors.append(float((total / step - exact).abs().max()))
    owed = torch.stack([feedback.state()["w"].double() for feedback in kept]).sum(0) / (3 if op == "avg" else 1)
    assert torch.allclose(total + owed, 24 * exact, rtol=0, atol=1e-4)
    assert errors[-1] < errors[0] / 5
