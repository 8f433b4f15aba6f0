"""The communicator's face: what it refuses before anything is sent, and the group of one."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from collectives import Communicator
from collectives.algorithms import ring
from collectives.errors import OptionError, UnsupportedTensor, UsageError
from collectives.membership.wire import parse_address
from collectives.operations import View
from tests.conformance.losses import goes_on
from tests.harness.residents import Residents

Call = Callable[[Communicator], Any]

REFUSED: dict[str, tuple[Call, type[Exception], str]] = {
    "meta tensor": (lambda c: c.all_reduce(torch.ones(3, device="meta")), UnsupportedTensor, "on meta"),
    "sparse tensor": (lambda c: c.all_reduce(torch.eye(3).to_sparse()), UnsupportedTensor, "dense"),
    "no tensor": (lambda c: c.all_reduce([1.0]), UnsupportedTensor, "not list"),  # type: ignore[call-overload]
    "unknown op": (lambda c: c.all_reduce(torch.ones(3), "median"), UsageError, "'median'"),
    "avg of integers": (lambda c: c.all_reduce(torch.ones(3).int(), "avg"), UnsupportedTensor, "not exact"),
    "sum of bools": (lambda c: c.all_reduce(torch.ones(3).bool()), UnsupportedTensor, "torch.bool"),
    "unknown algorithm": (lambda c: c.all_gather(torch.ones(3), algorithm="doubling"), UsageError, "there are auto"),
    "unknown on_loss": (lambda c: c.barrier(on_loss="ignore"), UsageError, "'ignore'"),
    "unknown keyword": (lambda c: c.barrier(lanes="x"), TypeError, "lanes"),  # type: ignore[call-overload]
    "0-d scatter": (lambda c: c.reduce_scatter(torch.ones(())), UsageError, "equal parts"),
    "out of another shape": (lambda c: c.all_reduce(torch.ones(3), out=torch.ones(4)), UsageError, "out is [4]"),
    "out of another dtype": (
        lambda c: c.all_gather(torch.ones(3), out=torch.ones(c.size, 3).int()),
        UsageError,
        "torch.int32",
    ),
    "root that is no member": (lambda c: c.broadcast(torch.ones(3), 77), UsageError, "ids, not ranks"),
    "reduce to no member": (lambda c: c.reduce(torch.ones(3), 77), UsageError, "ids, not ranks"),
    "0-d exchange": (lambda c: c.all_to_all(torch.ones(())), UsageError, "equal parts"),
    "unknown algorithm of another kind": (
        lambda c: c.all_to_all(torch.ones(c.size), algorithm="ring"),
        UsageError,
        "there are auto, pairwise",
    ),
    "scatter without rows": (lambda c: c.scatter(torch.ones(3), c.members[0]), UsageError, "gives the rows"),
    "scatter of other rows": (
        lambda c: c.scatter(torch.ones(3), c.members[0], torch.ones(c.size + 1, 3)),
        UsageError,
        "the rows are",
    ),
    "counts of another world": (
        lambda c: c.all_gather_v(torch.ones(2), [2] * (c.size + 1)),
        UsageError,
        "one for each member",
    ),
    "another own count": (lambda c: c.all_gather_v(torch.ones(2), [3] * c.size), UsageError, "counts say 3 rows"),
    "counts that do not add up": (
        lambda c: c.reduce_scatter_v(torch.ones(c.size), [3] * c.size),
        UsageError,
        "the tensor has",
    ),
    "negative counts": (
        lambda c: c.all_to_all_v(torch.ones(1), [2, -1, *[0] * c.size][: c.size] if c.size > 1 else [-1]),
        UsageError,
        "numbers of rows",
    ),
    "no tensors": (lambda c: c.all_reduce_coalesced([]), UsageError, "at least one"),
    "no bucket": (lambda c: c.all_reduce_coalesced([torch.ones(1)], bucket_bytes=0), UsageError, "bucket_bytes"),
    "a list with a bool": (
        lambda c: c.all_reduce_coalesced([torch.ones(1), torch.ones(1).bool()]),
        UnsupportedTensor,
        "torch.bool",
    ),
    "dense for sparse": (lambda c: c.all_reduce_sparse(torch.ones(3)), UnsupportedTensor, "sparse COO"),
    "largest of sparse ones": (
        lambda c: c.all_reduce_sparse((torch.arange(3), torch.ones(3)), "max"),
        UsageError,
        "sum, avg",
    ),
    "a pair of unequal lengths": (
        lambda c: c.all_reduce_sparse((torch.arange(3), torch.ones(4))),
        UsageError,
        "(nnz, ...)",
    ),
    "schedule for another world": (
        lambda c: c.run(ring.all_reduce(c.size + 1, 3), torch.ones(3)),
        UsageError,
        "a world of",
    ),
    "buffer of another size": (lambda c: c.run(ring.all_reduce(c.size, 3), torch.ones(4)), UsageError, "3 elements"),
    "buffer with gaps": (lambda c: c.run(ring.all_reduce(c.size, 3), torch.ones(6)[::2]), UsageError, "contiguous"),
}


def refuse_all(comm: Communicator) -> bool:
    """Every refused call, on rank 0 alone; the others need not notice."""
    if comm.rank == 0:
        for name, (call, error, said) in REFUSED.items():
            with pytest.raises(error) as caught:
                call(comm)
            assert said in str(caught.value), name
        with pytest.raises(UsageError, match="cannot be cut in 2 equal parts along dim 0"):
            comm.reduce_scatter(torch.ones(3))
    return goes_on(comm)


@pytest.fixture
def solo() -> Iterator[Communicator]:
    with Communicator.solo() as comm:
        yield comm


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(solo: Communicator, name: str) -> None:
    call, error, said = REFUSED[name]
    with pytest.raises(error) as caught:
        call(solo)
    assert said in str(caught.value)
    assert solo.all_reduce(torch.ones(1)).contributors == (1,)


def test_what_is_refused_costs_the_group_nothing() -> None:
    with Residents(2) as group:
        assert group.run(refuse_all) == [True, True]


def test_solo_is_a_group_of_one(solo: Communicator) -> None:
    assert (solo.rank, solo.size, solo.members, solo.member_id, solo.founder) == (0, 1, (1,), 1, True)
    assert solo.admit() is False
    state = {"weights": torch.arange(3.0), "step": 7}
    report = solo.sync(state)
    assert report.members == (1,)
    assert not report.healed
    with solo.step() as step:
        work = solo.all_reduce(torch.ones(2), "avg", async_op=True)
        assert work.wait().contributors == (1,)
    assert step.committed
    solo.resume()


def test_solo_leaves_inputs_alone_out_of_place(solo: Communicator) -> None:
    tensor = torch.arange(4.0)
    for outcome in (solo.all_reduce(tensor, inplace=False), solo.all_gather(tensor), solo.reduce_scatter(tensor)):
        assert outcome.result is not None
        assert outcome.result.data_ptr() != tensor.data_ptr()
        outcome.result.fill_(9)
    assert torch.equal(tensor, torch.arange(4.0))


def test_a_closed_communicator_says_so() -> None:
    comm = Communicator.solo()
    comm.leave()
    comm.close()
    with pytest.raises(UsageError, match="was closed; join again"):
        comm.barrier()


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "1:2:-3"])
def test_addresses_that_are_none_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGHOLD_COORDINATOR", raising=False)
    with pytest.raises(UsageError, match="give HOST:PORT"):
        parse_address(text)


def test_addresses_are_parsed_and_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_address("localhost:29400") == ("localhost", 29400)
    assert parse_address("[::1]:29400") == ("::1", 29400)
    monkeypatch.setenv("RINGHOLD_COORDINATOR", "10.0.0.1:5")
    assert parse_address("") == ("10.0.0.1", 5)


def test_join_refuses_what_it_cannot_use_before_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGHOLD_TOKEN", raising=False)
    monkeypatch.delenv("RINGHOLD_TOKEN_FILE", raising=False)
    with pytest.raises(UsageError, match="no token"):
        Communicator.join("127.0.0.1:1")
    with pytest.raises(OptionError, match="unknown option 'hartbeat'"):
        Communicator.join("127.0.0.1:1", token="t", options={"hartbeat": 1.0})
    with pytest.raises(OptionError, match="at least twice heartbeat"):
        Communicator.join("127.0.0.1:1", token="t", options={"heartbeat": 1.0, "heartbeat_timeout": 1.5})
    with pytest.raises(OptionError, match="tls_ca"):
        Communicator.join("127.0.0.1:1", token="t", options={"tls_ca": "/nowhere"})
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ringhold")]


def test_a_view_knows_its_size() -> None:
    assert View(3, (4, 7), 1).size == 2
