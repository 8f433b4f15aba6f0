"""The brute-force verifier over the whole table, and that it finds what is wrong or missing."""

from collections.abc import Callable, Iterator

import pytest

from parallel.graph import Node
from parallel.signatures import table
from parallel.signatures.samples import FAMILIES, Call, call, f, ids, samples
from parallel.signatures.signature import Signature
from parallel.signatures.table import P, linear, moved, unchanged
from parallel.signatures.verify import verify

NOT_RUN = "random"
"""The family whose operations give other values at each call; all-Broadcast is their only signature."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_signature_is_sound(family: Callable[[], Iterator[Call]]) -> None:
    findings = verify(family(), worlds=(3,), meshes=((2, 2),))
    assert [fault for finding in findings for fault in finding.unsound] == []
    assert all(finding.sound for finding in findings)


def test_every_operation_of_the_table_has_a_sample() -> None:
    covered = {sample.node.op for sample in samples()}
    assert covered == {op for op, entry in table.TABLE.items() if entry.family != NOT_RUN}


def test_a_false_signature_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def partial_relu(node: Node, _parts: int) -> Iterator[Signature]:
        yield from linear(node, "p")

    monkeypatch.setitem(table.TABLE, "aten.relu.default", table.Entry("wrong", partial_relu))
    (finding,) = verify([call("relu.default", f(4))], (2, 3), ())
    assert [text.partition(": ")[2] for text in finding.unsound] == [
        "P -> P on 2 ranks: output 0 is not (Partial(op='sum'),)",
        "P -> P on 3 ranks: output 0 is not (Partial(op='sum'),)",
    ]
    assert finding.sound == 2


def test_arguments_that_are_not_made_local_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = table.TABLE["aten.reshape.default"]
    monkeypatch.setitem(table.TABLE, "aten.reshape.default", table.Entry("wrong", entry.rule, unchanged))
    (finding,) = verify([call("reshape.default", f(4, 3), (12,))], (2,), ())
    assert any("it does not run" in text for text in finding.unsound)


def test_a_split_that_is_not_masked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def vocabulary(node: Node, _parts: int) -> Iterator[Signature]:
        yield moved(node, [0, None], [P])

    monkeypatch.setitem(table.TABLE, "aten.embedding.default", table.Entry("wrong", vocabulary, unchanged))
    (finding,) = verify([call("embedding.default", f(8, 2), ids(8, 5))], (2,), ())
    assert len(finding.unsound) == 1


def test_what_the_table_lacks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_alone(node: Node, _parts: int) -> Iterator[Signature]:
        yield moved(node, [0, None], [0])

    monkeypatch.setitem(table.TABLE, "aten.einsum.default", table.Entry("poor", rows_alone))
    (finding,) = verify([call("einsum.default", "ab,bc->ac", [f(4, 4), f(4, 5)])], (), (), searched=(2,))
    assert finding.missing == {"B, S(1) -> S(1)", "S(1), S(0) -> P", "P, B -> P", "B, P -> P"}
    monkeypatch.undo()
    (finding,) = verify([call("einsum.default", "ab,bc->ac", [f(4, 4), f(4, 5)])], (), (), searched=(2,))
    assert finding.missing == set()
