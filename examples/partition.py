"""A member that checks every sum for some seconds, and joins again whenever it was cut off. For `ringhold lab`.

ringhold lab --topology two-sites --cut hub-hub2@5s..12s -- python examples/partition.py
ringhold lab --topology mesh --random-cuts 600 --seed 1 -- python examples/partition.py 600
"""

import os
import sys
import time

import torch

from collectives import Communicator
from collectives.errors import CoordinatorUnreachable, Evicted

SIZES = (1, 1000, 100_000, 1_000_000)


def contribution(member: int, number: int) -> torch.Tensor:
    """What a member gives to the operation of that number: integers, so that their sums are exact."""
    return (torch.arange(SIZES[number % len(SIZES)]) + 31 * member + number).remainder(1009).double()


seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
end = time.monotonic() + seconds
members: tuple[int, ...] = ()
checked = out = number = over = 0
while not over:
    try:
        comm = Communicator.join()
    except (Evicted, CoordinatorUnreachable) as error:  # cut off again: later, perhaps
        print(f"not in: {error}")
        out += 1
        continue
    print(f"joined as member {comm.member_id} of epoch {comm.epoch}")
    try:
        while True:
            if comm.members != members:
                members = comm.members
                print(f"with members {list(members)}")
            # All work on the same number, whoever came late, and leave together.
            agreed = comm.all_reduce(torch.tensor([number + 1.0, time.monotonic() > end]), op="max").result
            number, over = map(int, agreed.tolist())
            if over:
                break
            outcome = comm.all_reduce(contribution(comm.member_id, number))
            expected = sum(contribution(member, number) for member in outcome.contributors)
            if not torch.equal(outcome.result, expected):
                sys.exit(f"WRONG: operation {number} of members {outcome.contributors}")
            checked += 1
            comm.admit()
            time.sleep(0.02)
        comm.leave()
    except (Evicted, CoordinatorUnreachable) as error:
        print(f"out: {error}")
        out += 1
        comm.close()
print(f"host {os.environ.get('RINGHOLD_LAB_HOST', '?')} is done: {checked} sums checked, out {out} times")
