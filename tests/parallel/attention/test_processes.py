"""Attention among real processes: the result, its gradients, its bytes, and what a death in the middle does."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from parallel.attention.formulas import rank_bytes, total_bytes
from parallel.attention.layout import SCHEMES, Problem
from parallel.attention.shares import Balance
from tests.harness.cluster import Cluster
from tests.harness.residents import Residents
from tests.parallel.attention import attention_programs as programs

WORLD = 4
BY_ROWS = ("ring", "bidirectional", "token_ring", "hybrid", "ulysses", "usp")


@pytest.fixture(scope="module")
def group() -> Iterator[Residents]:
    with Residents(WORLD, transport="sockets") as residents:
        yield residents


@pytest.fixture(scope="module")
def pair() -> Iterator[Residents]:
    with Residents(2, transport="sockets") as residents:
        yield residents


def settings(scheme: str) -> dict[str, Any]:
    return {"columns": 2, "parts": 2} if scheme in ("hybrid", "usp") else {"parts": 2}


def cases() -> list[dict[str, Any]]:
    found = []
    for number, scheme in enumerate((*SCHEMES, "auto")):
        for turn, balance in enumerate(("contiguous", "zigzag", "striped")):
            sizes = ((4, 4, 64, 64), (6, 2, 37, 37), (5, 1, 23, 41))[(number + turn) % 3]
            causal = turn > 0
            found.append(
                {
                    "scheme": scheme,
                    "balance": balance,
                    "causal": causal,
                    "sizes": sizes,
                    "seed": number,
                    "settings": settings(scheme),
                }
            )
    return found


@pytest.mark.parametrize("transport", ["sockets", "shm", "gloo"])
def test_every_scheme_is_exact_forward_and_backward(transport: str, group: Residents) -> None:
    chosen = cases()[::2] if transport == "sockets" else cases()[1::6]
    if transport == "sockets":
        found = group.run(programs.errors, cases=chosen)
    else:
        with Residents(3, transport=transport) as others:
            found = others.run(programs.errors, cases=[c for c in chosen if c["scheme"] not in ("hybrid", "usp")])
    worst = max(error for mine in found for error in mine)
    assert worst <= 1e-12


@pytest.mark.parametrize(
    "scheme, balance, causal",
    [
        ("ring", "zigzag", True),
        ("bidirectional", "contiguous", False),
        ("token_ring", "zigzag", True),
        ("ulysses", "striped", True),
    ],
)
def test_gradcheck_between_two_ranks(scheme: str, balance: str, causal: bool, pair: Residents) -> None:
    case = {"scheme": scheme, "balance": balance, "causal": causal, "settings": settings(scheme)}
    assert pair.run(programs.gradchecked, case=case) == [True, True]


def test_bytes_are_those_of_the_formulas(group: Residents) -> None:
    chosen: list[dict[str, Any]] = [
        {"scheme": scheme, "balance": balance, "causal": causal, "sizes": (4, 2, 64, 64), "settings": settings(scheme)}
        for scheme in BY_ROWS
        for balance, causal in (("contiguous", False), ("contiguous", True), ("zigzag", True), ("striped", True))
    ]
    found = group.run(programs.sent, cases=chosen)
    for number, case in enumerate(chosen):
        shares = Balance(case["balance"]).shares(64, WORLD)
        problem = Problem(
            2, 4, 2, 8, torch.float32, shares, shares, case["causal"], 1.0, case["scheme"], **case["settings"]
        )
        for way in (0, 1):
            sent = [mine[number][way] for mine in found]
            assert sum(sent) == total_bytes(problem, case["balance"], bool(way)), case
            if not case["causal"]:
                assert sent == [rank_bytes(problem, rank, bool(way)).sent for rank in range(WORLD)], case


def test_misuse_is_refused_on_all_ranks_alike(group: Residents) -> None:
    for given, why in (
        ({"scheme": "rings"}, "UsageError: scheme must be auto or one of ring"),
        ({"balance": "zigzag", "lengths": [[2, 1, 1, 1]] * 2}, "UsageError: zigzag: ranks must have [1, 1, 1, 2] rows"),
        ({"balance": "zigzag"}, "UsageError: zigzag: ranks must have [1, 1, 1, 2] rows, not [2, 1, 1, 1]"),
        ({"lengths": [[1, 1, 2], [1, 1, 2]]}, "UsageError: lengths name 3 and 3 ranks, and there are 4"),
        ({"scheme": "usp", "columns": 3}, "UsageError: usp: 3 columns do not divide 4 ranks"),
        ({"scheme": "ring", "parts": 0}, "UsageError: parts must be 1 or more"),
    ):
        for said in group.run(programs.refused, rows=[2, 1, 1, 1], settings=given):
            assert said.startswith(why), said


def test_members_that_disagree_are_told_in_what(group: Residents) -> None:
    """In all of these a message is as long as it should be: what came would be taken for something else."""
    same: dict[str, Any] = {"dtype": "float16", "shape": [1, 4, 2, 4]}
    changes = (
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"shape": [1, 2, 2, 8]}, "2 heads"),
        ({"scale": 0.25}, "scale 0.25"),
        ({"causal": True, "balance": "striped"}, "causal"),
    )
    for said in group.run(programs.disagrees, cases=[same | change for change, _ in changes]):
        assert len(said) == len(changes)
        for text, (_, why) in zip(said, changes, strict=True):
            assert why in text, text


def test_members_left_by_a_death_in_the_middle_compute_the_same() -> None:
    with Cluster(founders=3, heartbeat=0.1, transport="sockets") as cluster:
        peers = cluster.peers(programs.loses_one, 3, length=192)
        ranks = {peer.expect("attending")["rank"]: peer for peer in peers}
        victim = ranks[1]
        victim.kill()
        ending = victim.ending()
        assert ending.signal == signal.SIGKILL, "the fault did not fire"
        for peer in (ranks[0], ranks[2]):
            found = peer.result()
            assert (found["before"], found["after"], found["lost"]) == (3, 2, "MemberLost")
            assert found["worst"] <= 1e-12
