"""The registry of algorithms: what it makes, what it refuses, and which algorithm it names for a message."""

import subprocess
import sys

import pytest

from collectives import choice
from collectives.cost import PROFILES, Profile, profile_of
from collectives.errors import UsageError
from collectives.topology import Link

KINDS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all")


def test_every_kind_has_algorithms_that_make_schedules_of_that_kind_and_name() -> None:
    assert set(choice.kinds()) == set(KINDS)
    for kind in KINDS:
        for name in choice.names(kind):
            schedule = choice.build(kind, name, 4, 32)
            assert (schedule.kind, schedule.algorithm, schedule.world, schedule.count) == (kind, name, 4, 32)


def test_the_same_arguments_give_the_same_object() -> None:
    for kind in KINDS:
        for name in choice.names(kind):
            first = choice.build(kind, name, 3, 18, order=[2, 0, 1], hosts=[0, 0, 1])
            assert choice.build(kind, name, 3, 18, order=(2, 0, 1), hosts=(0, 0, 1)) is first
            assert choice.build(kind, name, 3, 27) is not first


def test_hints_are_left_to_those_that_have_a_use_for_them() -> None:
    assert choice.build("all_reduce", "doubling", 3, 9, order=[2, 0, 1], hosts=[0, 0, 1]) is choice.build(
        "all_reduce", "doubling", 3, 9
    )
    assert "order" in choice.takes("all_reduce", "ring")
    assert "hosts" in choice.takes("all_reduce", "hierarchical")


@pytest.mark.parametrize(
    ("kind", "algorithm", "asked", "message"),
    [
        ("allreduce", "ring", {}, r"no kind 'allreduce' of collective; there are all_reduce, "),
        ("reduce", "ring", {}, r"reduce: unknown algorithm 'ring'; there are binomial, double_tree, flat, direct"),
        ("broadcast", "ring", {"finish": True}, r"'ring' takes no finish; those that do: none of this kind"),
        ("all_reduce", "ring", {"root": 1}, r"takes no root"),
        ("all_reduce", "ring", {"counts": [3, 3, 3]}, r"takes no counts"),
        ("broadcast", "flat", {"root": 3}, r"broadcast with root 3: not a rank of a world of 3"),
        ("scatter", "binomial", {"root": -1}, r"scatter with root -1: not a rank"),
        ("all_gather", "direct", {"counts": [3, 3]}, r"counts must be 3 lengths that add up to 9; these are 2"),
        ("all_gather", "ring", {"counts": [3, 3, 4]}, r"and add up to 10"),
        ("all_gather", "ring", {"counts": [10, -1, 0]}, r"the least -1"),
        ("all_to_all", "bruck", {"counts": [3, 3, 3]}, r"counts must be 9 lengths"),
        ("all_reduce", "ring", {"order": [0, 1, 1]}, r"order must name each rank of a world of 3 once"),
        ("broadcast", "ring", {"order": [1, 2]}, r"order must name each rank of a world of 3 once"),
        ("all_reduce", "hierarchical", {"hosts": [0, 1]}, r"hosts must be one number a rank"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    kind: str, algorithm: str, asked: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choice.build(kind, algorithm, 3, 9, **asked)  # type: ignore[arg-type]


def test_blocks_that_are_not_equal_need_counts() -> None:
    with pytest.raises(UsageError, match="10 elements are not 3 x 3 equal blocks; give counts"):
        choice.build("all_to_all", "pairwise", 3, 10)


def test_a_refusal_names_the_algorithms_that_can() -> None:
    with pytest.raises(UsageError, match="takes no root; those that do: none of this kind"):
        choice.build("all_gather", "ring", 3, 9, root=1)


@pytest.mark.parametrize("transport", ["gloo", "sockets"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_small_all_reduces_double_and_large_ones_go_round_a_ring(transport: str, world: int) -> None:
    for nbytes in (0, 1, 1000, 32 * 1024):
        assert choice.choose("all_reduce", world, nbytes, profile=transport) == "doubling"
    for nbytes in (2**22, 2**26):
        assert choice.choose("all_reduce", world, nbytes, profile=transport) == "ring"
        assert choice.choose("broadcast", world, nbytes, profile=transport) == "ring"


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather", "all_to_all"])
def test_ranks_that_read_each_others_memory_deal_with_each_other_directly(kind: str) -> None:
    for world in (2, 4, 8):
        assert choice.choose(kind, world, 2**26, profile="shm") == "direct"


def test_small_messages_take_few_steps_in_large_worlds() -> None:
    assert choice.choose("all_reduce", 64, 1024) == "doubling"
    assert choice.choose("all_gather", 64, 1024) == "halving_doubling"
    assert choice.choose("all_to_all", 64, 64 * 64) == choice.choose("all_to_all", 1000, 1000 * 1000) == "bruck"
    for kind in ("broadcast", "reduce", "gather", "scatter"):
        assert choice.choose(kind, 64, 1024) == "binomial"


def test_hosts_are_heeded_where_there_are_several_of_several_ranks() -> None:
    hosts = [rank // 8 for rank in range(32)]
    assert choice.choose("all_reduce", 32, 2**26, hosts=hosts) == "hierarchical"
    for flat in (None, [0] * 32, range(32)):
        assert choice.choose("all_reduce", 32, 2**26, hosts=flat) != "hierarchical"
    with pytest.raises(UsageError, match="hosts must be one number a rank"):
        choice.choose("all_reduce", 32, 2**26, hosts=[0, 1])


def test_any_size_of_any_kind_in_any_world_has_an_algorithm_that_builds() -> None:
    for kind in KINDS:
        for world in (1, 2, 5, 65):
            for nbytes in (0, 1, 10_000, 10_000_000):
                name = choice.choose(kind, world, nbytes)
                assert choice.build(kind, name, world, world * world).algorithm == name


def test_worlds_of_thousands_are_chosen_for_from_what_scales() -> None:
    hosts = [rank // 8 for rank in range(2048)]
    for kind in KINDS:
        for nbytes in (2**10, 2**26):
            assert choice.choose(kind, 2048, nbytes) in choice.names(kind)
    assert choice.choose("all_reduce", 2048, 2**26, hosts=hosts) == "hierarchical"
    assert choice.choose("all_gather", 2048, 2**26, hosts=hosts) == "ring", "neighbours that share a host"


def test_sizes_share_the_choice_of_their_power_of_two() -> None:
    for kind in KINDS:
        for above, below in ((2**12, 2**11 + 1), (2**20, 2**19 + 1), (2**24, 2**23 + 1)):
            assert choice.choose(kind, 6, above) == choice.choose(kind, 6, below)


def test_the_choice_is_another_processes_choice() -> None:
    """Rule R8: it follows from the arguments alone, not from the order of a set or what was asked before."""
    cases = [(kind, world, nbytes) for kind in KINDS for world in (3, 8) for nbytes in (2**8, 2**17, 2**25)]
    here = [choice.choose(*case) for case in cases]
    code = f"from collectives.choice import choose; print([choose(*case) for case in {cases[::-1]!r}])"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert there.stdout.strip() == str(here[::-1])


def test_a_transport_that_is_not_known_is_taken_for_sockets() -> None:
    assert profile_of("emulated") is PROFILES["sockets"]
    assert choice.choose("all_reduce", 4, 2**26, profile="emulated") == "ring"


def test_a_profile_decides() -> None:
    link = Link(latency=1.0, bandwidth=1e12)
    patient = Profile(near=link, far=link, overhead=0.0, reduce_rate=1e12)
    assert choice.choose("all_to_all", 8, 2**20, profile=patient) == "direct"
    busy = Profile(near=Link(latency=0.0, bandwidth=1e12), far=link, overhead=1.0, reduce_rate=1e12)
    assert choice.choose("all_to_all", 8, 2**20, profile=busy) == "bruck"
