"""State that outlives the death of a member: in memory with second copies, else refused by name."""

import itertools

import pytest

from collectives.communicator import Communicator
from collectives.errors import UsageError
from parallel.boxing import boxing
from parallel.carry import Replicas, buddy, carry, refreshing
from parallel.layout import Broadcast, Flat, Layout, Mesh, Partial, Placement, Split
from tests.harness.cluster import Cluster
from tests.parallel import carry_programs as programs

ALONE = ["both", "columns", "flat"]
"""What a rank of a mesh of 2 x 2 holds alone; of the rest there are two copies, or four."""


@pytest.mark.parametrize("victim", [0, 3])
def test_with_second_copies_all_state_outlives_a_death(victim: int) -> None:
    with Cluster(founders=4) as cluster:
        peers = cluster.peers(programs.survive, 4, redundancy=True)
        ranked = sorted(peers, key=lambda peer: peer.expect("ready")["rank"])
        ranked[victim].kill()
        left = [peer for peer in ranked if not peer.killed]
        for peer in left:
            peer.tell("go")
        assert [peer.result() for peer in left] == [{"wrong": [], "size": 3, "copied": ALONE}] * 3


def test_without_them_the_tensors_that_are_gone_are_named() -> None:
    with Cluster(founders=4) as cluster:
        peers = cluster.peers(programs.survive, 4, redundancy=False)
        ranked = sorted(peers, key=lambda peer: peer.expect("ready")["rank"])
        ranked[1].kill()
        left = [peer for peer in ranked if not peer.killed]
        for peer in left:
            peer.tell("go")
        for told in (peer.result() for peer in left):
            assert told["size"] == 3
            assert "both (9 of 36 elements), columns (6 of 24 elements), flat (6 of 25 elements);" in told["lost"]
            assert "rows" not in told["lost"]


def test_a_buddy_is_another_rank_for_every_shard() -> None:
    mesh = Mesh.of(x=2, y=3)
    kept = buddy(Layout(mesh, (Split(0), Split(1))), (4, 6))
    assert kept is not None
    assert kept.mesh.ranks == (2, 0, 1, 5, 3, 4)
    assert buddy(Layout(mesh, (Split(0), Broadcast())), (4, 6)) is None
    assert buddy(Layout(Mesh.of(x=1), (Split(0),)), (4, 6)) is None
    assert buddy(Layout(Mesh.of(x=3), (Split(0),)), (1,)) is not None
    with pytest.raises(UsageError, match="partial value is no state"):
        buddy(Layout(mesh, (Partial(), Broadcast())), (4, 6))


def test_alone_nothing_moves() -> None:
    mesh = Mesh.of(x=1, y=1)
    placed, state = programs.layouts(mesh), programs.tensors(3)
    shards = programs.parts(state, placed, 0)
    with Communicator.solo() as comm:
        carried = carry(
            shards, placed, placed, programs.SHAPES, comm.members, comm, Replicas.of(placed, programs.SHAPES)
        )
    assert all((carried[name] == shards[name]).all() for name in programs.SHAPES)


@pytest.mark.parametrize("mesh", [Mesh.of(x=3), Mesh.of(x=2, y=3), Mesh.of(x=4, y=1)])
def test_what_second_copies_cost_in_closed_form_is_what_is_sent(mesh: Mesh) -> None:
    told, able = 0, list[Placement]([Broadcast(), Split(0), Split(1), Flat()])
    for placed in itertools.product(able, repeat=len(mesh.axes)):
        for shape in [(5, 7), (2, 6), (8, 3)]:
            layout = Layout(mesh, placed)
            copy, cost = buddy(layout, shape), refreshing(layout, shape)
            assert (copy is None) == (cost is None)
            if copy is not None and cost is not None:
                told += 1
                assert cost.elements == boxing(layout, copy, shape).elements
    assert told
