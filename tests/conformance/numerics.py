"""What the members do in `test_numerics`: quantized and reproducible all-reduces, against one process' arithmetic."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from collectives import faults, quantize, reproducible
from collectives.communicator import Communicator
from collectives.error_feedback import ErrorFeedback
from collectives.errors import MemberLost
from tests.conformance.losses import dying, goes_on
from tests.conformance.values import laid_out, rough
from tests.harness.peer import Peer, bits

SHAPES: list[list[int]] = [[], [0], [1], [7, 5], [256], [3, 257], [70_001]]
LAYOUTS = ("contiguous", "strided", "transposed", "leaf")
BULK = 300_007
MICROBATCHES = 7


def quantized(inputs: Sequence[Tensor], codec: str, op: str) -> Tensor:
    """What rounding to nearest must give, to the bit: decoded, added in the order of ranks, encoded, decoded."""
    coder, count = quantize.CODECS[codec], inputs[0].numel()
    records = torch.empty(quantize.blocks(count) * coder.record, dtype=torch.uint8)
    total, one = torch.zeros(count), torch.zeros(count)
    for number, given in enumerate(inputs):
        coder.encode(given.reshape(-1), records)
        coder.decode(records, one)
        total = one.clone() if number == 0 else total + one
    if op == "avg":
        total /= len(inputs)
    if count:
        coder.encode(total, records)
        coder.decode(records, total)
    return total.to(inputs[0].dtype).view(inputs[0].shape)


def exact_sum(contributions: Sequence[Tensor], op: str = "sum") -> Tensor:
    """The reproducible sum, by one accumulator."""
    like = contributions[0]
    adder, count = reproducible.accumulator(like.dtype, like.numel()), like.numel()
    slots = torch.empty(1, adder.blocks(count), adder.up, dtype=torch.uint8)
    adder.encode([one.reshape(-1) for one in contributions], count, slots.view(-1))
    values = torch.empty(count, dtype=adder.dtype)
    if count:
        adder.decode(adder.combine(slots, op == "avg").view(-1), values)
    return values.to(like.dtype).view(like.shape)


def quantize_everything(comm: Communicator) -> list[str]:
    """All codecs, dtypes, shapes and layouts; in place, to a new tensor and to `out`."""
    digests = []
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for number, (shape, codec) in enumerate(product(SHAPES, quantize.CODECS)):
        dtype, layout, op = dtypes[number % 3], LAYOUTS[number % 4], ("sum", "avg")[number % 2]
        layout = layout if shape else "contiguous"
        case = (shape, codec, dtype, layout, op)
        inputs = [rough(rank, shape, dtype, number) for rank in range(comm.size)]
        expected = quantized(inputs, codec, op)
        tensor = laid_out(inputs[comm.rank], layout)
        outcome = comm.all_reduce(tensor, op, codec=codec, inplace=False)
        assert outcome.result is not None
        assert torch.equal(outcome.result, expected), case
        assert torch.equal(tensor, inputs[comm.rank]), case
        out = laid_out(torch.zeros_like(expected), layout)
        assert comm.all_reduce(tensor, op, codec=codec, out=out, async_op=True).wait().result is out
        assert torch.equal(out, expected), case
        assert comm.all_reduce(tensor, op, codec=codec).result is tensor
        assert torch.equal(tensor, expected), case
        digests.append(bits(outcome.result))
    return digests


def round_at_random(comm: Communicator) -> list[str]:
    """Stochastic rounding: near to the exact sum, new at every operation, the same on every member."""
    digests = []
    inputs = [rough(rank, [5000], torch.float32, 3) for rank in range(comm.size)]
    exact = torch.stack([one.double() for one in inputs]).sum(0)
    spread = {"int8": 255, "int4": 15, "bf16": 64}
    for codec, steps in spread.items():
        bound = (sum(float(one.max() - one.min()) for one in inputs) + float(exact.max() - exact.min()) + 8) / steps
        for _ in range(2):
            result = comm.all_reduce(inputs[comm.rank], codec=codec, rounding="stochastic", inplace=False).result
            assert result is not None
            assert float((result.double() - exact).abs().max()) <= bound
            digests.append(bits(result))
    assert len(set(digests)) == len(digests), "the same noise in two operations"
    return digests


def feed_back(comm: Communicator) -> list[str]:
    """The mean of many sums with error feedback comes near to the exact one."""
    inputs = [rough(rank, [3000], torch.float32, 4) for rank in range(comm.size)]
    exact = torch.stack([one.double() for one in inputs]).mean(0)
    feedback, total, steps, digests = ErrorFeedback(), torch.zeros(3000, dtype=torch.float64), 30, []
    for step in range(steps):
        outcome = comm.all_reduce(inputs[comm.rank], "avg", codec="int4", inplace=False, feedback=feedback.of("w"))
        assert outcome.result is not None
        total += outcome.result
        digests.append(bits(outcome.result))
        if step == 0:
            first = float((total - exact).abs().max())
    assert float((total / steps - exact).abs().max()) < first / 4
    # What all still owe is all that is missing.
    owed = feedback.state()["w"].double()
    comm.all_reduce(owed)
    assert torch.allclose(total + owed / comm.size, steps * exact, rtol=0, atol=1e-3)
    return digests


def microbatches(shape: list[int], dtype: torch.dtype) -> list[Tensor]:
    """The contributions of a step, whoever holds them; of all magnitudes, one almost the opposite of another."""
    found = [rough(number, shape, dtype, 11) * 10.0 ** (3 * number - 9) for number in range(MICROBATCHES - 1)]
    return [*found, -found[0] * (1 + 2.0**-9)]


def held(found: list[Tensor], comm: Communicator) -> list[Tensor]:
    """A member's share, in an order of its own."""
    return found[comm.rank :: comm.size][:: -1 if comm.rank % 2 else 1]


def add_reproducibly(comm: Communicator) -> list[str]:
    """The digests do not depend on the number of members."""
    digests = []
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for shape, dtype, op in product(([], [0], [33, 3], [40_003]), dtypes, ("sum", "avg")):
        found = microbatches(shape, dtype)
        target = torch.full(shape, 7, dtype=dtype)
        outcome = comm.all_reduce(target, op, reproducible=True, contributions=held(found, comm))
        assert outcome.result is target
        assert torch.equal(target.view(-1).view(torch.uint8), exact_sum(found, op).view(-1).view(torch.uint8))
        digests.append(bits(target))
    return digests


def add_tensors_reproducibly(comm: Communicator) -> list[str]:
    """One contribution a member: the tensor itself, of any layout, with infinities and NaNs."""
    digests = []
    for number, (layout, dtype) in enumerate(product(LAYOUTS, (torch.float32, torch.float64))):
        inputs = [rough(rank, [41, 13], dtype, number) for rank in range(comm.size)]
        inputs[-1][3, 4], inputs[0][5, 6], inputs[-1][7, 8] = torch.inf, -torch.inf, torch.nan
        expected = exact_sum(inputs)
        tensor = laid_out(inputs[comm.rank], layout)
        result = comm.all_reduce(tensor, reproducible=True, inplace=False, snapshot=True).result
        assert result is not None
        assert bits(result) == bits(expected), (layout, dtype)
        comm.all_reduce(tensor, reproducible=True)
        assert torch.equal(tensor.nan_to_num(), expected.nan_to_num())
        digests.append(bits(result))
    return digests


def mortal(peer: Peer, kind: str, point: str, victim: int) -> dict[str, Any]:
    """Rank `victim` dies at a point of an operation; the others tell what became of theirs."""
    comm = peer.join()
    assert goes_on(comm)
    members, rank = comm.members, comm.rank
    feedback = ErrorFeedback()
    inputs = {member: rough(member, [BULK], torch.float32, 5) for member in members}
    mine = inputs[comm.member_id]
    before = mine.clone()
    if rank == victim:
        faults.arm(point, dying(peer))
    report: dict[str, Any] = {"lost": []}
    how: dict[str, Any] = {"inplace": False, "on_loss": "raise" if kind == "raise" else "retry"}
    if kind == "reproducible":
        how |= {"reproducible": True, "contributions": [mine, mine * 0.5]}
    else:
        how |= {"codec": "int8", "feedback": feedback.of("w")}
    try:
        outcome = comm.all_reduce(mine, "avg", **how)
    except MemberLost as error:
        report["lost"] = error.lost
        report["residual"] = bool(feedback.state())
        comm.resume()
    else:
        assert outcome.result is not None
        given = [inputs[member] for member in outcome.contributors]
        halves = [one * 0.5 for one in given]
        want = exact_sum([*given, *halves], "avg") if kind == "reproducible" else quantized(given, "int8", "avg")
        report |= {"right": torch.equal(outcome.result, want), "bits": bits(outcome.result)}
        report |= {"contributors": outcome.contributors, "before": members}
    report["intact"] = torch.equal(mine, before)
    assert goes_on(comm)
    comm.leave()
    return report
