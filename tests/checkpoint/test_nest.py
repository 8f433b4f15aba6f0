"""Nested states as JSON and back."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import nest
from checkpoint.holdings import merge_states
from collectives.errors import LayoutMismatch, UsageError


class Leaf:
    """Stands for a tensor."""


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 80), 1 << 80)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
keys = st.text(max_size=4) | st.integers(-3, 3) | st.sampled_from(["$tensor", "$dict", "a/b", "a%2Fb", "%"])
nests = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(keys, nests, max_size=4))
def test_any_state_reads_back_through_json(state: dict[Any, Any]) -> None:
    packed, tensors = nest.take_apart(state, lambda _: False)
    assert tensors == {}
    back = nest.put_together(json.loads(json.dumps(packed)), str)
    assert back == state
    assert repr(back) == repr(state), "types, and the order of dicts"


def test_tensors_are_named_by_their_path() -> None:
    leaves = [Leaf() for _ in range(4)]
    state = {"a/b": {0: leaves[0]}, "l": [leaves[1], (leaves[2],)], "100%": leaves[3]}
    packed, tensors = nest.take_apart(state, lambda value: isinstance(value, Leaf))
    assert tensors == {"a%2Fb/0": leaves[0], "l/0": leaves[1], "l/1/0": leaves[2], "100%25": leaves[3]}
    assert nest.tensor_keys(packed) == list(tensors)
    assert nest.parts_of("a%2Fb/0") == ("a/b", "0")
    assert nest.put_together(packed, tensors.__getitem__) == state


def test_special_floats() -> None:
    packed, _ = nest.take_apart({"x": [math.nan, math.inf, -math.inf, -0.0]}, lambda _: False)
    back = nest.put_together(json.loads(json.dumps(packed)), str)["x"]
    assert list(map(str, back)) == ["nan", "inf", "-inf", "-0.0"]


def test_what_cannot_be_kept_is_named() -> None:
    loop: dict[str, Any] = {}
    loop["x"] = loop
    twice = {0: Leaf(), "0": Leaf()}
    for state, words in (
        ({"a": [{"b": object()}]}, "a builtins.object at 'a/0/b'"),
        ({"a": {1.5: 0}}, "the key 1.5; keys must be str or int"),
        ({"a": {True: 0}}, "the key True"),
        ({"a": "\ud800"}, "not valid Unicode"),
        (loop, "nested deeper than 64"),
        ({"t": twice}, "two tensors of the state have the key 't/0'"),
    ):
        with pytest.raises(UsageError) as caught:
            nest.take_apart(state, lambda value: isinstance(value, Leaf))
        assert words in str(caught.value)


def test_states_of_ranks_are_united_by_their_keys() -> None:
    parts = [{"a": 1, "by": {rank: [rank]}, f"only{rank}": {"x": (rank,)}} for rank in range(3)]
    packed = {rank: nest.take_apart(part, lambda _: False)[0] for rank, part in enumerate(parts)}
    united = nest.put_together(merge_states(packed), str)
    assert united["by"] == {0: [0], 1: [1], 2: [2]}
    assert united["only2"] == {"x": (2,)}
    packed[1] = nest.take_apart({"a": True, "by": {0: [9]}}, lambda _: False)[0]
    with pytest.raises(LayoutMismatch) as caught:
        merge_states(packed)
    assert caught.value.mismatched == ("a", "by/0")
