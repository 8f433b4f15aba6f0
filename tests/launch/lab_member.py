"""A member that reduces until everybody has seen the group fall apart and come together again. For `test_lab`."""

import os

import torch

from collectives.communicator import Communicator
from collectives.errors import Evicted


def main() -> None:
    """Print what is seen of the group; end when all have seen enough."""
    everybody = int(os.environ["RINGHOLD_LAB_HOSTS"])
    apart = False
    while True:
        comm = Communicator.join()
        try:
            while True:
                apart |= comm.size < everybody
                seen = torch.tensor([apart and comm.size == everybody], dtype=torch.int32)
                outcome = comm.all_reduce(seen, op="min")
                assert outcome.result is not None
                if outcome.result.item() and len(outcome.contributors) == everybody:
                    comm.leave()
                    print("together again", flush=True)
                    return
                comm.admit()
        except Evicted:
            print("evicted", flush=True)
            apart = True
            comm.close()


if __name__ == "__main__":
    main()
