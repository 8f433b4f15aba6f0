"""Rule R9: members that call different operations all get `DescriptorMismatch`, and the group is none the worse."""

import re
from collections.abc import Iterator

import pytest

from tests.conformance.headers import CASES, disagree
from tests.harness.residents import Residents


@pytest.fixture(scope="module", params=(2, 3, 4))
def group(request: pytest.FixtureRequest) -> Iterator[Residents]:
    with Residents(request.param) as residents:
        yield residents


def test_r9_every_member_is_told_both_sides(group: Residents) -> None:
    for number, case in enumerate(CASES):
        odd = [number % group.size] if number % 2 else list(range(1 + number % (group.size - 1)))
        reports = group.run(disagree, case=case, odd=odd)
        said = {report["said"] for report in reports}
        assert len(said) == 1, (case, odd, said)
        found = re.fullmatch(
            r"operation \d+ of lane 'main': member (\d) called (.+), member (\d) called (.+); "
            "make every member call the same",
            said.pop(),
        )
        assert found is not None, (case, reports)
        one, mine, other, theirs = found.groups()
        assert one != other, case
        assert mine.split(", as operation")[0] != theirs.split(", as operation")[0], (case, mine)
        assert all(report["same members"] and report["goes on"] for report in reports), (case, reports)
