"""A member that reduces for some seconds, and joins again whenever it was cut off. For `ringhold lab`."""

import os
import sys
import time

import torch

from collectives import Communicator
from collectives.errors import Evicted

end = time.monotonic() + (float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
host = os.environ.get("RINGHOLD_LAB_HOST", "?")
members: tuple[int, ...] = ()
done = torch.zeros(1)
while not done.item():
    comm = Communicator.join()
    print(f"joined as member {comm.member_id} of epoch {comm.epoch}")
    try:
        while True:
            if comm.members != members:
                members = comm.members
                print(f"with members {list(members)}")
            done = torch.tensor([float(time.monotonic() > end)])
            if comm.all_reduce(done, op="max").result.item():  # all leave together
                break
            comm.all_reduce(torch.ones(100_000))
            comm.admit()
            time.sleep(0.02)
        comm.leave()
    except Evicted as error:
        print(f"out: {error}")
        comm.close()
print(f"host {host} is done")
