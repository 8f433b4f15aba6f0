"""The competitors of a benchmark: our communicator, torch.distributed's own gloo, and the MPI library's collectives.

Each does the same operation on the same memory (`bench_cases.Case`) and hands back where the result is. Called by
`launch.bench_rank`, in every rank process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from collectives.calls import How
from collectives.communicator import Communicator
from collectives.errors import UsageError
from collectives.outcome import Outcome, Work
from launch.bench_cases import Case


class Competitor(Protocol):
    """Whoever can run the operation of a case."""

    rank: int

    def run(self, cases: Sequence[Case], inplace: bool) -> list[Tensor | None]:
        """Run one operation a case (ours: at once, each on a lane) and return the results."""

    def align(self) -> None:
        """Return at the same time on all ranks, by the competitor's own barrier: what it runs next finds them awake."""

    def close(self) -> None:
        """Free what it holds."""


class Ours:
    """A communicator. Its out-of-place results are handed over without a copy, as any caller of it gets them."""

    def __init__(self, comm: Communicator, algorithm: str) -> None:
        self.comm = comm
        self.rank = comm.rank
        self._algorithm = algorithm

    def run(self, cases: Sequence[Case], inplace: bool) -> list[Tensor | None]:
        """See Competitor. One case runs in the caller's thread, several on lanes of their own."""
        if len(cases) == 1:
            outcome = self._start(cases[0], inplace, "main", False)
            assert isinstance(outcome, Outcome)
            return [outcome.result]
        works = [self._start(case, inplace, f"bench {lane}", True) for lane, case in enumerate(cases)]
        return [work.wait().result for work in works if isinstance(work, Work)]

    def align(self) -> None:
        """See Competitor."""
        self.comm.barrier()

    def close(self) -> None:
        """Leave the run."""
        self.comm.leave()

    def _start(self, case: Case, inplace: bool, lane: str, queued: bool) -> Outcome | Work:
        comm, how = self.comm, How(lane=lane, algorithm=self._algorithm)
        tensor = case.spot(self.rank) if inplace else case.given
        # The type of the result hangs on a flag that is not a literal here.
        call: Any = getattr(comm, case.kind.name)
        match case.kind.name:
            case "all_reduce":
                started = call(tensor, case.op, inplace=inplace, async_op=queued, **how)
            case "reduce_scatter":
                started = call(tensor, case.op, async_op=queued, **how)
            case "all_gather":
                started = call(tensor, out=case.taken if inplace else None, async_op=queued, **how)
            case "all_to_all":
                started = call(tensor, async_op=queued, **how)
            case "reduce":
                started = call(tensor, comm.members[case.root], case.op, inplace=inplace, async_op=queued, **how)
            case "gather" | "broadcast":
                started = call(tensor, comm.members[case.root], async_op=queued, **how)
            case "scatter":
                rows = tensor if self.rank == case.root else None
                started = call(case.taken, comm.members[case.root], rows, async_op=queued, **how)
            case _:
                started = call(async_op=queued, **how)
        assert isinstance(started, Outcome | Work)
        return started


class TorchGloo:
    """torch.distributed over gloo, as any torch program uses it.

    Args:
        folder: the same for all ranks, for the store by which they meet.

    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.rank = rank
        # Without the number of ranks: else the last of them removes the file as another opens it, which waits for it.
        store = dist.FileStore(str(folder / "gloo"))  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)

    def run(self, cases: Sequence[Case], inplace: bool) -> list[Tensor | None]:
        """See Competitor; the cases one after the other."""
        return [self._run(case, inplace) for case in cases]

    def align(self) -> None:
        """See Competitor."""
        dist.barrier()

    def close(self) -> None:
        """Destroy the group."""
        dist.destroy_process_group()

    def _run(self, case: Case, inplace: bool) -> Tensor | None:
        given = (case.spot(self.rank) if inplace else case.given).view(-1)
        taken = case.taken.view(-1)
        # Before torch 2.13 these had other names, which it deprecates.
        reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        match case.kind.name:
            case "all_reduce":
                if not inplace:
                    taken.copy_(given)
                dist.all_reduce(taken, _torch_op(case))
            case "reduce_scatter":
                reduce_scatter(taken, given, op=_torch_op(case))
            case "all_gather":
                all_gather(taken, given)
            case "all_to_all":
                dist.all_to_all_single(taken, given)
            case "reduce":
                if not inplace:
                    taken.copy_(given)
                dist.reduce(taken, case.root, _torch_op(case))
            case "gather":
                dist.gather(given, list(case.taken) if self.rank == case.root else None, case.root)
            case "scatter":
                dist.scatter(taken, list(case.given) if self.rank == case.root else None, case.root)
            case "broadcast":
                dist.broadcast(taken, case.root)
            case _:
                dist.barrier()
                return None
        return taken.div_(case.ranks) if case.op == "avg" else taken


class Mpi:
    """The MPI library's own collectives, through mpi4py's interface for buffers, on a communicator of their own."""

    def __init__(self, ranks: int) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UsageError(f'MPI cannot be had ({error}); install it: pip install "ringhold[mpi]"') from None
        if MPI.COMM_WORLD.size != ranks:
            raise UsageError(f"MPI sees {MPI.COMM_WORLD.size} processes, not {ranks}: start through mpirun or mpiexec")
        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank = int(self._comm.rank)

    def run(self, cases: Sequence[Case], inplace: bool) -> list[Tensor | None]:
        """See Competitor; the cases one after the other."""
        return [self._run(case, inplace) for case in cases]

    def align(self) -> None:
        """See Competitor."""
        self._comm.Barrier()

    def close(self) -> None:
        """Free the communicator."""
        self._comm.Free()

    def _run(self, case: Case, inplace: bool) -> Tensor | None:
        comm, taken = self._comm, case.taken.numpy()
        given = self._mpi.IN_PLACE if inplace else case.given.numpy()
        match case.kind.name:
            case "all_reduce":
                comm.Allreduce(given, taken, self._op(case))
            case "reduce_scatter":
                comm.Reduce_scatter_block(given, taken, self._op(case))
            case "all_gather":
                comm.Allgather(given, taken)
            case "all_to_all":
                comm.Alltoall(given, taken)
            case "reduce":
                mine = taken if inplace and self.rank != case.root else given
                comm.Reduce(mine, taken if self.rank == case.root else None, self._op(case), case.root)
            case "gather":
                comm.Gather(given, taken, case.root)
            case "scatter":
                comm.Scatter(given, taken, case.root)
            case "broadcast":
                comm.Bcast(taken, case.root)
            case _:
                comm.Barrier()
                return None
        return case.taken.div_(case.ranks) if case.op == "avg" else case.taken

    def _op(self, case: Case) -> Any:
        return getattr(self._mpi, {"avg": "SUM"}.get(case.op, case.op.upper()))


def _torch_op(case: Case) -> Any:
    """Return torch's name of a reduce op; gloo has no average, so it is a sum that is divided."""
    return {
        "sum": dist.ReduceOp.SUM,
        "avg": dist.ReduceOp.SUM,
        "prod": dist.ReduceOp.PRODUCT,
        "min": dist.ReduceOp.MIN,
        "max": dist.ReduceOp.MAX,
    }[case.op]
