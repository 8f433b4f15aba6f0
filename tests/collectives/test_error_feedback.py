"""Error feedback: sums over many operations come right, and only complete operations change a residual."""

import pytest
import torch
from torch import Tensor

from collectives.communicator import Communicator
from collectives.error_feedback import ErrorFeedback
from collectives.errors import UsageError
from collectives.operations import View
from collectives.operations.quantized import Quantized

STEPS = 40


def gradient(seed: int = 1, count: int = 1000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_mean_over_steps_converges_as_one_over_the_steps(rounding: str) -> None:
    comm, feedback, exact = Communicator.solo(), ErrorFeedback(), gradient().double()
    sums, errors = torch.zeros_like(exact), []
    for step in range(STEPS):
        given = gradient()
        outcome = comm.all_reduce(given, codec="int4", rounding=rounding, feedback=feedback.of("w"))
        assert outcome.result is given
        sums += given.double()
        errors.append(float((sums / (step + 1) - exact).abs().max()))
    residual = feedback.state()["w"].double()
    assert torch.allclose(sums + residual, STEPS * exact, rtol=0, atol=1e-4), "nothing is lost but what is still owed"
    assert errors[-1] < errors[0] / STEPS * 6
    assert errors[0] > 0.1


def test_without_feedback_the_error_stays() -> None:
    comm, exact = Communicator.solo(), gradient()
    rounded = comm.all_reduce(gradient(), codec="int4", inplace=False).result
    assert rounded is not None
    again = comm.all_reduce(gradient(), codec="int4", inplace=False).result
    assert again is not None
    assert torch.equal(rounded, again)
    assert float((rounded - exact).abs().max()) > 0.1


def test_an_operation_that_is_not_delivered_leaves_the_residual_alone() -> None:
    feedback, comm = ErrorFeedback(), Communicator.solo()
    comm.all_reduce(gradient(), codec="int4", feedback=feedback.of("w"))
    before = feedback.state()["w"].clone()
    tensor = gradient(2)
    view = View(1, (1, 2), 0)
    operation = Quantized(
        tensor=tensor, lane="main", on_loss="retry", view=view, op="sum", codec="int4", feedback=feedback.of("w")
    )
    first = operation.plan(view).source.clone()
    again = operation.plan(View(2, (1,), 0)).source
    assert torch.equal(first, again), "a second attempt sends the same"
    assert torch.equal(feedback.state()["w"], before)
    assert torch.equal(tensor, gradient(2))


def test_a_repeated_step_begins_with_the_residuals_of_before() -> None:
    feedback, comm = ErrorFeedback(), Communicator.solo()
    comm.all_reduce(gradient(), codec="int8", feedback=feedback.of("w"))
    saved = feedback.state()
    first = comm.all_reduce(gradient(2), codec="int8", feedback=feedback.of("w")).result
    feedback.restore(saved)
    second = comm.all_reduce(gradient(2), codec="int8", feedback=feedback.of("w")).result
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_what_is_not_finite_leaves_no_residual() -> None:
    feedback, comm = ErrorFeedback(), Communicator.solo()
    spoilt = gradient()
    spoilt[3] = float("nan")
    result = comm.all_reduce(spoilt, codec="int8", feedback=feedback.of("w")).result
    assert result is not None
    assert result[:256].isnan().all()
    assert result[256:].isfinite().all()
    assert feedback.state()["w"].isfinite().all()
    assert not feedback.state()["w"][:256].any()


def test_a_residual_fits_one_tensor() -> None:
    feedback, comm = ErrorFeedback(), Communicator.solo()
    comm.all_reduce(gradient(), codec="int8", feedback=feedback.of("w"))
    with pytest.raises(UsageError, match="use another name"):
        comm.all_reduce(gradient(count=7), codec="int8", feedback=feedback.of("w"))
    with pytest.raises(UsageError, match="belong to a codec"):
        comm.all_reduce(gradient(), feedback=feedback.of("w"))
