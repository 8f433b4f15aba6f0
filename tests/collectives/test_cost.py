"""The cost model against sums done by hand, and profiles as files."""

from pathlib import Path

import msgspec
import pytest

from collectives import choice
from collectives.cost import PROFILES, Profile, estimate
from collectives.engine import NOTE_BYTES
from collectives.errors import UsageError
from collectives.topology import Link

NEAR, FAR = Link(latency=0.5, bandwidth=100.0), Link(latency=4.0, bandwidth=10.0)
PROFILE = Profile(near=NEAR, far=FAR, overhead=0.25, reduce_rate=50.0, operation=8.0)
EXACT = pytest.approx


def cost(kind: str, algorithm: str, world: int, count: int, hosts: list[int] | None = None, itemsize: int = 1) -> float:
    schedule = choice.build(kind, algorithm, world, count, hosts=hosts)
    return estimate(schedule, PROFILE, itemsize, hosts) - PROFILE.operation


def test_a_world_of_one_costs_the_operation_alone() -> None:
    assert cost("all_reduce", "ring", 1, 1000) == 0


def test_balanced_steps_add_up() -> None:
    step = 0.5 + 2 * 0.25 + 100 / 100  # latency, a message out and one in, bytes
    assert cost("all_gather", "ring", 4, 400) == EXACT(3 * step)
    assert cost("reduce_scatter", "ring", 4, 400) == EXACT(3 * (step + 100 / 50))
    assert cost("all_reduce", "ring", 4, 400) == EXACT(6 * step + 3 * 100 / 50)
    assert cost("all_gather", "direct", 4, 400) == EXACT(0.5 + 6 * 0.25 + 300 / 100)


def test_a_finish_is_paid_for_like_a_reduction() -> None:
    plain, finished = (choice.build("all_reduce", "ring", 4, 400, finish=finish) for finish in (False, True))
    assert estimate(finished, PROFILE) - estimate(plain, PROFILE) == EXACT(100 / 50)


def test_elements_count_with_their_size() -> None:
    assert cost("all_reduce", "halving_doubling", 5, 100, itemsize=8) == cost("all_reduce", "halving_doubling", 5, 800)


def test_ranges_to_one_peer_in_a_step_are_one_message() -> None:
    pieces = choice.build("all_gather", "halving_doubling", 5, 500)
    assert max(len(step.sends) for rank in range(5) for step in pieces.local(rank).steps) == 2
    assert cost("all_gather", "halving_doubling", 5, 500) == EXACT(3 * (0.5 + 2 * 0.25) + 400 / 100)


def test_the_root_of_a_star_sends_one_message_after_the_other() -> None:
    assert cost("broadcast", "flat", 5, 100) == EXACT(0.5 + 4 * 0.25 + 400 / 100)
    assert cost("gather", "flat", 5, 500) == EXACT(0.5 + 4 * 0.25 + 400 / 100)


def test_segments_that_are_passed_on_fill_a_chain() -> None:
    count = 64 * NOTE_BYTES
    busiest = count / 100 + 2 * 64 * 0.25  # bytes out while as many come in; a message out and one in a segment
    first = 4 * (0.5 + 2 * 0.25 + NOTE_BYTES / 100)
    assert cost("broadcast", "ring", 5, count) == EXACT(busiest + first)
    assert cost("broadcast", "ring", 5, 1) == EXACT(4 * (0.5 + 0.25 + 1 / 100)), "a single segment only hops"


def test_long_schedules_are_judged_by_some_of_their_steps() -> None:
    step = 0.5 + 2 * 0.25 + 100 / 100
    assert cost("all_gather", "ring", 1000, 100_000) == EXACT(999 * step)


def test_a_hosts_ranks_share_its_link() -> None:
    hosts = [0, 0, 1, 1]
    latency_and_messages = 4.0 + 6 * 0.25
    across = 2 * 2 * 100 / 10  # two ranks send a chunk to two ranks each
    assert cost("all_gather", "direct", 4, 400, hosts) == EXACT(latency_and_messages + across - 1.5)
    assert cost("all_gather", "direct", 4, 400, [7] * 4) == cost("all_gather", "direct", 4, 400)


def test_across_hosts_the_hierarchical_form_is_cheapest_for_large_messages() -> None:
    hosts = [rank // 4 for rank in range(16)]
    costs = {name: cost("all_reduce", name, 16, 10**6, hosts) for name in choice.names("all_reduce")}
    assert min(costs, key=lambda name: costs[name]) == "hierarchical"


def test_hosts_are_one_a_rank() -> None:
    with pytest.raises(UsageError, match="hosts must be one number a rank; there are 2 for a world of 4"):
        estimate(choice.build("all_gather", "ring", 4, 4), PROFILE, hosts=[0, 1])


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILES[name].save(path)
    assert Profile.load(path) == PROFILES[name]
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]


def written(tmp_path: Path, **changes: object) -> Path:
    fields = msgspec.to_builtins(PROFILE) | changes
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode({name: value for name, value in fields.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overheads": 1.0}, "unknown field `overheads`"),
        ({"overhead": None}, "missing required field `overhead`"),
        ({"overhead": "1"}, "Expected `float`, got `str`"),
        ({"overhead": -1.0}, "overhead must be a number of seconds, 0 or more, not -1.0"),
        ({"operation": -1.0}, "operation must be a number of seconds"),
        ({"reduce_rate": 0.0}, "reduce_rate must be a positive number of bytes a second, not 0.0"),
        ({"near": {"latency": 0.0, "bandwidth": 0.0}}, "bandwidth must be a positive number"),
        ({"near": {"latency": 0.0}}, "missing required field `bandwidth`"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UsageError, match=f"profile.json is no profile of costs: .*{message}"):
        Profile.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the profile .*absent.json: No such file"):
        Profile.load(tmp_path / "absent.json")
    with pytest.raises(UsageError, match=r"cannot write the profile .*: No such file"):
        PROFILE.save(tmp_path / "absent" / "profile.json")
    (tmp_path / "half.json").write_text('{"near": {')
    with pytest.raises(UsageError, match=r"half.json is no profile of costs"):
        Profile.load(tmp_path / "half.json")
