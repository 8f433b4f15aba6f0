"""One training step of the main job's GPT on a text that is too long for the memory of one process.

    export RINGHOLD_TOKEN=$(openssl rand -hex 16) RINGHOLD_HEARTBEAT_TIMEOUT=20
    ringhold coordinator --listen 127.0.0.1:29400 --founders 4 &
    python examples/long_context.py & python examples/long_context.py & ...     # four times
    python examples/long_context.py --alone                                     # does not fit: ends with code 1

Each process may use no more than `--memory` MiB beyond what it needs to start: the system refuses more of its own, and
a step after which shared memory came on top of that fails, too. The rows of the sequence are spread over the members,
so each keeps the activations of its own rows; attention sees all of them, forward and backward.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from collectives import Communicator
from launch.data import load
from launch.model import GPT, Shape, build
from parallel import sequence_parallel


def main() -> int:
    """Take the step, and say how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", default="127.0.0.1:29400")
    parser.add_argument("--alone", action="store_true", help="one process, no network")
    parser.add_argument("--length", type=int, default=8192, help="bytes of text")
    parser.add_argument("--memory", type=int, default=320, help="MiB that a process may use for the step")
    given = parser.parse_args()
    torch.set_num_threads(1)
    comm = Communicator.solo() if given.alone else Communicator.join(given.coordinator)
    with comm:
        text = load([], given.length, 1).train[: given.length + 1].long().unsqueeze(0)
        model = build(Shape(192, 6, 4), given.length, torch.float32, torch.Generator().manual_seed(0))
        before, limit = status("VmRSS"), status("VmData") + given.memory * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        begun = time.monotonic()
        try:
            loss = step(model, text, comm)
        except (MemoryError, RuntimeError) as error:
            print(f"rank {comm.rank} of {comm.size}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            return 1
        used = (status("VmHWM") - before) / 2**20
        took = time.monotonic() - begun
        print(f"rank {comm.rank} of {comm.size}: loss {loss:.6f} after {took:.1f} s, {used:.0f} MiB at most")
        return 0 if used <= given.memory else 1


def step(model: GPT, text: torch.Tensor, comm: Communicator) -> float:
    """Forward, backward, gradients of all members added up, update. Returns the mean loss of the whole text."""
    length = text.shape[1] - 1
    with sequence_parallel(comm, length, balance="zigzag", scheme="ring", parts=8) as spread:
        ids, targets = spread.shard(text[:, :-1], 1), spread.shard(text[:, 1:], 1)
        x = F.embedding(ids, model.tokens) + model.positions[spread.indices]
        for block in model.blocks:
            x = block(x)
        logits = F.linear(model.norm(x), model.tokens)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), reduction="sum") / length
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    comm.all_reduce_coalesced(gradients, on_loss="raise")
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    total = comm.all_reduce(loss.detach(), on_loss="raise").result
    assert total is not None
    return float(total)


def status(field: str) -> int:
    """Bytes of memory of this process: private (VmData), resident (VmRSS), or the most that was resident (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
