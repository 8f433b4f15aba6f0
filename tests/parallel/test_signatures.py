"""The table of signatures: rules that everyone knows, what is refused, and a proof on the nodes of a real step."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from collectives.errors import UsageError
from parallel.graph import Graph, Node, Role, Value
from parallel.layout import Mesh
from parallel.models.examples import example
from parallel.signatures import Signature, UnknownOperation, localize, signatures, together
from parallel.signatures.samples import Call, call, f, ids
from parallel.signatures.table import B
from parallel.signatures.verify import verify


def written(sample: Call, parts: int) -> set[str]:
    return set(map(str, signatures(sample.node, parts)))


@pytest.mark.parametrize(
    ("sample", "parts", "expected"),
    [
        # OneFlow, arXiv 2110.15032, table 1
        (
            call("einsum.default", "ab,bc->ac", [f(8, 4), f(4, 6)]),
            2,
            "B, B -> B; S(0), B -> S(0); B, S(1) -> S(1); S(1), S(0) -> P; P, B -> P; B, P -> P",
        ),
        # A vocabulary of 3 cannot be split over 4, the width of 8 can.
        (call("embedding.default", f(3, 8), ids(3, 4)), 4, "B, B -> B; B, S(0) -> S(0); S(1), B -> S(1); P, B -> P"),
        (call("embedding.default", f(9, 2), ids(9, 5)), 4, "B, B -> B; B, S(0) -> S(0); S(0), B -> P; P, B -> P"),
        # Softmax: any dimension but its own.
        (call("_softmax.default", f(4, 4), -1, False), 2, "B -> B; S(0) -> S(0)"),
        # 6 heads of 2: the width of 12 may be split over 2 and 3 ranks, not over 4.
        (
            call("reshape.default", f(3, 12), (3, 6, 2)),
            3,
            "B -> B; S(0) -> S(0); S(1) -> S(1); P -> P; P(max) -> P(max); P(min) -> P(min)",
        ),
        (
            call("reshape.default", f(4, 12), (4, 6, 2)),
            4,
            "B -> B; S(0) -> S(0); P -> P; P(max) -> P(max); P(min) -> P(min)",
        ),
        # A constant must not be added on every rank.
        (call("add.Tensor", f(4), 1.0), 2, "B -> B; S(0) -> S(0)"),
        (call("full.default", (4, 1), 0, dtype=torch.float64), 2, "nothing -> B; nothing -> S(0); nothing -> P"),
        (call("full.default", (4, 1), 3, dtype=torch.float64), 2, "nothing -> B; nothing -> S(0)"),
    ],
)
def test_known_rules(sample: Call, parts: int, expected: str) -> None:
    assert written(sample, parts) == set(expected.split("; "))


def test_the_first_signature_is_that_every_rank_does_all_of_it() -> None:
    node = call("mul.Tensor", f(4), f(4)).node
    assert signatures(node, 2)[0] == Signature((B, B), (B,))
    assert signatures(node, 1)[0] == Signature((B, B), (B,))


def test_grouped_heads_are_split_with_their_keys() -> None:
    def heads(query: int, key: int, parts: int) -> bool:
        name = "_scaled_dot_product_flash_attention_for_cpu.default"
        sample = call(name, f(1, query, 3, 4), f(1, key, 3, 4), f(1, key, 3, 4), 0.0, True)
        return "S(1), S(1), S(1) -> S(1), S(1)" in written(sample, parts)

    assert heads(8, 4, 2)
    assert heads(8, 4, 4)
    assert not heads(8, 2, 4)  # a key's head would be needed by two ranks
    assert heads(6, 6, 4)  # uneven, but query and key stay in step
    assert not heads(6, 3, 2)


def test_an_unknown_operation_is_named_and_done_by_all() -> None:
    value = Value("x", (4,), torch.float32)
    node = Node("odd", "aten.digamma.default", (value,), (), (Value("y", (4,), torch.float32),), module="layers.3.mlp")
    with pytest.warns(UnknownOperation, match=r"aten\.digamma\.default .*layers\.3\.mlp.*do all of it"):
        assert signatures(node, 2) == (Signature((B,), (B,)),)
    run = localize(node, [Signature((B,), (B,))], Mesh.of(x=2), 1)
    assert torch.equal(run([torch.ones(4)])[0], torch.special.digamma(torch.ones(4)))


def test_what_may_meet_on_two_axes() -> None:
    view = call("reshape.default", f(4, 3), (12,)).node
    by_text = {str(signature): signature for signature in signatures(view, 2)}
    split, whole = by_text["S(0) -> S(0)"], by_text["B -> B"]
    partial, largest = by_text["P -> P"], by_text["P(max) -> P(max)"]
    assert together(view, [split, whole], (2, 2))
    assert together(view, [split, split], (2, 2))  # 4 ranks, 4 rows
    assert not together(view, [split, split], (4, 2))  # 8 ranks, 4 rows
    assert together(view, [split, partial], (2, 2))
    assert not together(view, [partial, largest], (2, 2))
    assert not together(view, [split, whole], (3, 2))  # 4 rows over 3 ranks do not stay rows of 3


def test_localize_refuses_signatures_of_another_form() -> None:
    node = call("mul.Tensor", f(4), f(4)).node
    with pytest.raises(UsageError, match="a signature for each axis"):
        localize(node, [Signature((B, B), (B,))], Mesh.of(x=2, y=2), 0)
    with pytest.raises(UsageError, match="a signature for each axis"):
        localize(node, [Signature((B,), (B,))], Mesh.of(x=2), 0)


def calls(graph: Graph, inputs: dict[str, Tensor]) -> Iterator[Call]:
    """Each kind of node of a step with the tensors that it meets; alike ones once."""
    tensors: dict[str, Tensor] = {}
    for source in graph.inputs:
        known = graph.constants if source.role == Role.CONSTANT else inputs
        tensors[source.value.name] = known[source.name].detach()
    seen = set()
    for node in graph.nodes:
        given = tuple(tensors[value.name] for value in node.inputs)
        tensors.update(zip((value.name for value in node.outputs), node.call(given), strict=True))
        constants = str([arg for arg in node.args if not isinstance(arg, Value)])
        form = (node.op, constants, tuple(value.shape for value in node.inputs))
        if form not in seen:
            seen.add(form)
            yield Call(node, given)


@pytest.mark.parametrize("name", ["mixtral", "vit", "cnn"])
def test_every_signature_of_a_real_step_holds_on_its_own_tensors(name: str) -> None:
    torch.manual_seed(3)
    case = example(name, 4, layers=1 if name == "mixtral" else 0, dtype=torch.float64, device="cpu")
    step = case.capture()
    inputs = step.inputs(case.model, case.optimizer, case.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownOperation)
        findings = verify(calls(step.graph, inputs), (2,), ())
    assert [fault for finding in findings for fault in finding.unsound] == []
    assert sum(finding.sound for finding in findings) > 200
