"""A process that ends without leaving ends in good order, and the others go on."""

import pytest

from tests.conformance.endings import forgetful
from tests.harness.cluster import Cluster


@pytest.mark.parametrize(("size", "under_way"), [(3, False), (2, True)])
def test_a_script_that_forgets_to_leave_ends_well(size: int, under_way: bool) -> None:
    with Cluster(founders=size) as cluster:
        cluster.run(forgetful, size, under_way=under_way)
