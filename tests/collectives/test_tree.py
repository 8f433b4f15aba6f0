"""A state goes into a skeleton and tensors and comes back to the bit; what cannot is refused by its path."""

import contextlib
import enum
import struct
from collections import OrderedDict
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives import rawbytes, tree
from collectives.errors import ProtocolError, UsageError
from collectives.tree import Slot, flatten, parse, refill
from tests.collectives.states import QUICK, STATES, State, clone


def same(one: Any, other: Any) -> bool:
    """Equality to the bit, spelled out apart from the code under test."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and (
            rawbytes.read(one).tobytes() == rawbytes.read(other).tobytes()
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@QUICK
@given(STATES, STATES)
def test_equal_skeletons_and_tensors_exactly_if_equal(one: State, other: State) -> None:
    flat, again = flatten(one), flatten(clone(one))
    assert flat.skeleton == again.skeleton
    assert same(list(flat.tensors), list(again.tensors))
    different = flatten(other)
    assert same(one, other) == (flat.skeleton == different.skeleton and same(flat.tensors, different.tensors))


@QUICK
@given(STATES, STATES)
def test_any_state_is_refilled_to_any_other(one: State, other: State) -> None:
    flat = flatten(one)
    refill(other, parse(flat.skeleton), flat.tensors)
    assert same(one, other)


@QUICK
@given(STATES)
def test_slots_and_paths_lead_to_the_tensors(state: State) -> None:
    flat = flatten(state)
    parsed = parse(flat.skeleton)
    assert [slot.index for slot in parsed.slots] == list(range(len(flat.tensors)))
    for slot, path, tensor in zip(parsed.slots, parsed.paths, flat.tensors, strict=True):
        found: Any = state
        for key in path:
            found = found[key]
        assert found is tensor
        assert slot.nbytes == tensor.numel() * tensor.element_size()


def test_the_order_in_which_a_dict_was_filled_does_not_count() -> None:
    one = {"b": 1, 10: 2, "a": 3, 9: 4}
    other = OrderedDict([(9, 4), ("a", 3), ("b", 1), (10, 2)])
    assert flatten(one).skeleton == flatten(other).skeleton
    assert list(parse(flatten(one).skeleton).root) == [9, 10, "a", "b"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0, 0.0),
        (0, False),
        (1, True),
        (0.0, -0.0),
        (float("inf"), float("-inf")),
        (b"a", "a"),
        ([], ()),
        ([1], (1,)),
        (None, False),
        ({}, []),
        ({"0": 1}, {0: 1}),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (2**64, 2**64 + 1),
        (["i", b"\x00"], 0),
        (["x", "float32"], torch.zeros(())),
    ],
)
def test_things_that_differ_have_other_skeletons(one: Any, other: Any) -> None:
    assert flatten({"k": one}).skeleton != flatten({"k": other}).skeleton
    assert not same(one, other)


@pytest.mark.parametrize("bits", [0x7FF8000000000123, 0x7FF0000000000001, 0xFFF8000000000000, 0x8000000000000000])
def test_nan_payloads_and_signs_of_floats_are_kept(bits: int) -> None:
    value = struct.unpack("<d", struct.pack("<Q", bits))[0]
    back = parse(flatten({"k": value}).skeleton).root["k"]
    assert struct.unpack("<Q", struct.pack("<d", back))[0] == bits


UINT4: torch.dtype = getattr(torch, "uint4")  # noqa: B009 - the type stubs do not know it


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [1, {2}]}}, "builtins.set at 'a/b/1'"),
        ({"a": np.float64(1)}, "numpy.float64 at 'a'"),
        ({"a": np.zeros(2)}, "numpy.ndarray at 'a'"),
        ({"a": Colour.RED}, "Colour at 'a'"),
        ({"a": 1j}, "builtins.complex at 'a'"),
        ({"a": torch.Size([1])}, "torch.Size at 'a'"),
        ({"a": torch.float32}, "torch.dtype at 'a'"),
        ({"a": {True: 1}}, "the dict at 'a' has the key True"),
        ({"a": {(1,): 1}}, "the dict at 'a' has the key (1,)"),
        ({"a": {None: 1}}, "the dict at 'a' has the key None"),
        ({"a": "\ud800"}, "at 'a' is not valid Unicode"),
        ({"a": torch.zeros(2, device="meta")}, "the tensor at 'a' is on device meta"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "the tensor at 'a' has layout torch.sparse_coo"),
        ({"a": torch.zeros(2, dtype=UINT4)}, "the tensor at 'a' has dtype torch.uint4"),
        ([1], "a state must be a dict, not a list"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_its_path(state: Any, words: str) -> None:
    with pytest.raises(UsageError) as error:
        flatten(state)
    assert words in str(error.value)


def test_a_tensor_subclass_is_refused() -> None:
    class Tagged(torch.Tensor):
        pass

    with pytest.raises(UsageError, match=r"the tensor at 'a' is a .*Tagged"):
        flatten({"a": torch.zeros(2).as_subclass(Tagged)})


def test_a_dict_that_holds_itself_is_refused() -> None:
    state: State = {}
    state["again"] = state
    with pytest.raises(UsageError, match="does something hold itself"):
        flatten(state)


def test_too_much_outside_of_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_SKELETON", 100)
    with pytest.raises(UsageError, match="keep bulk data in tensors"):
        flatten({"a": b"x" * 100})
    with pytest.raises(ProtocolError, match="over the limit"):
        parse(b"x" * 101)


def packed(node: object) -> bytes:
    return msgspec.msgpack.encode(node)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc7\x03\x05abc",
        packed(["l"]),
        packed(3),
        packed(["d", "a"]),
        packed(["d", "a", ["?"]]),
        packed(["d", "a", []]),
        packed(["d", "a", {}]),
        packed(["d", "a", [["l"]]]),
        packed(["d", "b", 1, "a", 1]),
        packed(["d", "a", 1, "a", 1]),
        packed(["d", "a", 1, 0, 1]),
        packed(["d", 2, 1, 1, 1]),
        packed(["d", True, 1]),
        packed(["d", 1.0, 1]),
        packed(["d", ["x", "float32"], 1]),
        packed(["d", "a", ["i", b"\x01"]]),
        packed(["d", "a", ["i", b""]]),
        packed(["d", "a", ["i", b"\x00" * 12]]),
        packed(["d", "a", ["i", (1 << 70).to_bytes(10, "little")]]),
        packed(["d", "a", ["i", 5]]),
        packed(["d", "a", ["x"]]),
        packed(["d", "a", ["x", "object"]]),
        packed(["d", "a", ["x", "float32", -1]]),
        packed(["d", "a", ["x", "float32", True]]),
        packed(["d", "a", ["x", "float32", 1.0]]),
        packed(["d", "a", ["x", "float32", 1 << 47]]),
        packed(["d", "a", ["x", "float32", 1 << 40, 1 << 40]]),
        packed(["d", "a", ["x", "float32", 0, 1 << 47, 1 << 47]]),
        packed(["d", "a", ["x", "float32", *[1] * 65]]),
        packed(["d", "a", ["l"]]) + b"\x00",
    ],
)
def test_a_skeleton_that_nobody_could_have_made_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(data)


def test_a_skeleton_nested_too_deeply_is_refused() -> None:
    node: object = 1
    for _ in range(70):
        node = ["l", node]
    with pytest.raises(ProtocolError, match="nested deeper"):
        parse(packed(["d", "a", node]))


@QUICK
@given(STATES, st.data())
def test_a_damaged_skeleton_is_refused_or_is_the_skeleton_of_another_state(state: State, data: st.DataObject) -> None:
    good = bytearray(flatten(state).skeleton)
    good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read = parse(bytes(good))
    except ProtocolError:
        return
    assert all(isinstance(slot, Slot) and slot.nbytes <= tree.MAX_TENSOR for slot in read.slots)


@QUICK
@given(st.binary(max_size=60))
def test_noise_does_no_harm(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert "k" in parse(b"\x93\xa1d\xa1k" + data).root


def test_containers_are_refilled_and_not_replaced() -> None:
    inner: State = {"x": 1, "gone": 2}
    items = [1, 2, 3]
    state: State = {"inner": inner, "items": items, "kind": {"a": 1}}
    target: State = {"inner": {"x": 5, "new": {"y": 1}}, "items": [4], "kind": [1]}
    refill(state, parse(flatten(target).skeleton), ())
    assert same(state, target)
    assert state["inner"] is inner
    assert state["items"] is items


def test_a_value_of_the_same_bits_stays_the_object_it_is() -> None:
    text, pair = "".join(["a", "b"]), (1.5, "".join(["c", "d"]))
    state: State = {"text": text, "pair": pair, "sign": 0.0}
    refill(state, parse(flatten({"text": "ab", "pair": (1.5, "cd"), "sign": -0.0}).skeleton), ())
    assert state["text"] is text
    assert state["pair"] is pair
    assert struct.pack("<d", state["sign"]) == struct.pack("<d", -0.0)


def test_a_dict_in_two_places_is_parted_where_the_target_differs() -> None:
    shared: State = {"x": 1}
    state: State = {"a": shared, "b": shared, "c": [shared, shared]}
    target: State = {"a": {"x": 2}, "b": {"x": 3}, "c": [{"x": 4}, {}]}
    refill(state, parse(flatten(target).skeleton), ())
    assert same(state, target)
    assert state["a"] is shared


def test_differing_names_the_roots_of_what_differs() -> None:
    def tokens(state: State) -> dict[tree.Path, bytes]:
        flat = flatten(state)
        return tree.tokens(parse(flat.skeleton), [rawbytes.read(tensor).tobytes() for tensor in flat.tensors])

    one = {"a": {"b": 1, "c": torch.ones(2)}, "d": [1, 2], "e": {"f": {"g": 1}}, "h": 100, "i": 0.0}
    other = {"a": {"b": 1, "c": torch.zeros(2)}, "d": (1, 2), "h": {}, "i": -0.0}
    assert tree.differing([tokens(one), tokens(other)]) == ("a/c", "d", "e", "h", "i")
    assert tree.differing([tokens(one), tokens(one)]) == ()
    assert tree.differing([tokens(one), tokens(one), tokens({**one, "h": 101})]) == ("h",)
