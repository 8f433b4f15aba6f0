"""A process that ends without leaving ends in good order, and the others go on."""

import pytest

from tests.conformance.endings import forgetful
from tests.harness.cluster import Cluster


@pytest.mark.parametrize("under_way", [False, True])
def test_a_script_that_forgets_to_leave_ends_well(under_way: bool) -> None:
    with Cluster(founders=3) as cluster:
        cluster.run(forgetful, 3, under_way=under_way)
