"""Three of these and a coordinator: kill any one while they run, and see who is in each sum.

export RINGHOLD_TOKEN=$(openssl rand -hex 16)
ringhold coordinator --listen 127.0.0.1:29400 --founders 3 &
for i in 1 2 3; do python examples/survive.py & done
"""

import torch

from collectives import Communicator


def main() -> None:
    """Average a tensor over whoever is here, 600 times."""
    with Communicator.join("127.0.0.1:29400") as comm:
        for number in range(600):
            outcome = comm.all_reduce(torch.full((1_000_000,), float(comm.member_id)), op="avg")
            assert outcome.result is not None
            print(f"{number}: members {outcome.contributors}, average {outcome.result[0].item():.3f}", flush=True)
            comm.admit()


if __name__ == "__main__":
    main()
