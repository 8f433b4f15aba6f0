"""AdamW has torch's bits; the schedule has its shape."""

import itertools

import pytest
import torch

from launch.optimizer import AdamW, WarmupCosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_equal_those_of_torch_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mine = {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in _SHAPES.items()}
    theirs = {name: tensor.clone() for name, tensor in mine.items()}
    ours = AdamW(mine, weight_decay=0.1)
    groups = [
        {"params": [theirs[name] for name in group.members], "weight_decay": group.weight_decay}
        for group in ours.groups.values()
    ]
    torchs = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(15):
        lr = 1e-3 * (step + 1)
        for name, tensor in mine.items():
            tensor.grad = torch.randn(tensor.shape, dtype=dtype, generator=generator)
            theirs[name].grad = tensor.grad.clone()
        for group in torchs.param_groups:
            group["lr"] = lr
        ours.step(lr)
        torchs.step()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name])
        assert torch.equal(ours.moments[name].exp_avg_sq, torchs.state[theirs[name]]["exp_avg_sq"])


_SHAPES = {"matrix": (7, 13), "norm": (13,), "table": (31, 5)}


def test_matrices_decay_and_norms_do_not() -> None:
    parameters = {name: torch.ones(shape) for name, shape in _SHAPES.items()}
    optimizer = AdamW(parameters, weight_decay=0.5)
    for tensor in parameters.values():
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step(0.1)
    assert parameters["matrix"][0, 0] == pytest.approx(0.95)
    assert torch.equal(parameters["norm"], torch.ones(13))


def test_the_schedule_warms_up_peaks_and_comes_down_to_its_floor() -> None:
    schedule = WarmupCosine(peak=1.0, floor=0.1, warmup=4, decay_steps=14)
    rates = [schedule.lr(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.55)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[14:] == [0.1] * 6
    assert WarmupCosine(1.0, 0.1, 10, 5).lr(9) == 1.0  # shorter than its warmup
    assert WarmupCosine(1.0, 0.1, 0, 5).lr(0) == 1.0
    assert WarmupCosine(**schedule.values()) == schedule
