"""Headers that differ: what was issued on either side of a loss is told apart from what is another operation."""

from typing import Any

import pytest

from collectives.descriptor import Descriptor, decode

MEMBERS = (1, 2, 3)


def header(**given: Any) -> Descriptor:
    common = {"epoch": 3, "lane": "main", "seq": 9, "view": 0, "kind": "reduce_scatter", "dtype": "int64"}
    rest = {"shape": (6, 2), "op": "sum", "root": 0, "algorithm": "ring", "on_loss": "retry"}
    return Descriptor(**{**common, **rest, **given})


def test_a_header_survives_the_wire() -> None:
    assert decode(header(view=7).encode()) == header(view=7)


@pytest.mark.parametrize("differs", [{}, {"shape": (4, 2)}, {"root": 2}, {"algorithm": "direct"}])
def test_what_follows_from_other_views_was_issued_apart(differs: dict[str, Any]) -> None:
    before, after = header(view=7), header(view=8, **differs)
    assert before.issued_apart(after, MEMBERS)
    assert after.issued_apart(before, MEMBERS)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (header(view=7), header(view=7, shape=(4, 2))),  # one view: somebody is mistaken
        (header(), header(root=2)),  # such as do not depend on a view
        (header(view=7), header(view=8, kind="all_to_all")),
    ],
)
def test_other_operations_are_a_mismatch(mine: Descriptor, theirs: Descriptor) -> None:
    assert not mine.issued_apart(theirs, MEMBERS)


def test_a_root_who_is_gone_was_named_before_the_loss() -> None:
    before, after = header(kind="broadcast", root=9), header(kind="broadcast", root=2)
    assert after.issued_apart(before, MEMBERS)
    assert not after.issued_apart(header(kind="reduce", root=9), MEMBERS)
