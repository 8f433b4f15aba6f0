"""A process that ends without leaving ends in good order, and the others go on."""

import pytest

from tests.conformance.endings import forgetful
from tests.harness.cluster import Cluster


@pytest.mark.parametrize("under_way", [False, True])
def test_a_script_that_forgets_to_leave_ends_well(under_way: bool) -> None:
    with Cluster(founders=3) as cluster:
        members = sorted(
            cluster.peers(forgetful, 3, under_way=under_way), key=lambda process: process.expect("rank")["rank"]
        )
        if under_way:
            members[0].expect("entered")
            members[0].tell("go")
            members[0].result()
            for process in members[1:]:
                process.tell("go")
        for process in members:
            process.result()
