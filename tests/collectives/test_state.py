"""A state's digest says what it should, and an assembly turns any state into any other, in place."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectives import rawbytes
from collectives.assembly import Assembly
from collectives.errors import CorruptChunk, ProtocolError, UsageError
from collectives.hashing import CHUNK_BYTES, digest, leaf_digest
from collectives.state import StateIndex, index_state, outline_tokens, state_hash
from tests.collectives.states import QUICK, STATES, State, clone, training

CHUNK_FLOATS = CHUNK_BYTES // 4


def heal(state: State, target: State, **given: Any) -> tuple[Assembly, tuple[int, ...]]:
    """Make `state` the target, with what is lacking taken from it; the assembly and the numbers of new tensors."""
    source, local = index_state(clone(target)), index_state(state)
    assembly = Assembly(source.index, local)
    giver = Assembly(source.index, source)
    for chunk in source.index.sizes:
        if not assembly.holds(chunk):
            assembly.put(chunk, giver.content(chunk))
    return assembly, assembly.apply(state)


# --- digests ---


def test_a_state_has_the_digest_that_it_always_had() -> None:
    state = {"w": torch.arange(4, dtype=torch.float32), "lr": 0.1, 3: [None, True, b"x", "é", (1 << 70,)]}
    assert state_hash(state) == "a9aacadb6262c76d12a7b8744d10a8dcfce3a235632790772db8b422e9b507eb"


@QUICK
@given(STATES)
def test_copies_have_equal_digests(state: State) -> None:
    assert state_hash(state) == state_hash(clone(state))


@QUICK
@given(STATES, st.data())
def test_a_flipped_bit_is_another_digest(state: State, data: st.DataObject) -> None:
    before = index_state(state)
    full = [tensor for tensor in before.tensors if tensor.numel() and tensor.dtype is not torch.bool]
    if full:
        tensor = data.draw(st.sampled_from(full))
        raw = rawbytes.read(tensor).copy()
        where = data.draw(st.integers(0, len(raw) - 1))
        raw[where] ^= 1 << data.draw(st.integers(0, 7))
        rawbytes.write(tensor, [(0, raw)])
        assert state_hash(state) != before.index.digest.hex()


def test_strides_and_aliases_do_not_count() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    apart = {"w": base.t().contiguous(), "tied": base.t().contiguous()}
    together = {"w": base.t(), "tied": base.t()}
    assert state_hash(apart) == state_hash(together)
    assert state_hash({"w": torch.ones(1).expand(5)}) == state_hash({"w": torch.ones(5)})


def test_views_that_conjugate_or_negate_count_as_what_they_show() -> None:
    number = torch.tensor([1 + 2j, 3 - 4j])
    shown: State = {"a": number, "b": number.conj(), "c": number.conj().imag}
    assert shown["c"].is_neg()
    assert state_hash(shown) == state_hash(
        {"a": number, "b": torch.tensor([1 - 2j, 3 + 4j]), "c": torch.tensor([-2.0, 4])}
    )
    target: State = {"a": torch.tensor([5 + 6j, 0]), "b": torch.tensor([5 - 6j, 0]), "c": torch.tensor([-6.0, 0])}
    target["b"], target["c"] = target["a"].conj().resolve_conj(), target["a"].conj().imag.resolve_neg()
    _, created = heal(shown, target)
    assert created == ()
    assert torch.equal(number, target["a"])
    assert state_hash(shown) == state_hash(target)


def test_a_shared_tensor_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def count(tensor: torch.Tensor) -> rawbytes.Bytes:
        hashed.append(tensor.numel())
        return plain(tensor)

    plain = rawbytes.read
    monkeypatch.setattr("collectives.state.rawbytes.read", count)
    weight = torch.zeros(7)
    index_state({"a": weight, "b": [weight, weight.view(7)], "c": weight[:3]})
    assert sorted(hashed) == [3, 7]


def test_nan_payloads_count() -> None:
    def of(bits: int) -> State:
        return {"x": torch.tensor([bits], dtype=torch.int32).view(torch.float32)}

    assert len({state_hash(of(bits)) for bits in (0x7FC00000, 0x7FC00001, -0x400000, 0x7F800001)}) == 4
    assert state_hash({"x": torch.tensor([-0.0])}) != state_hash({"x": torch.tensor([0.0])})


def test_chunks_lie_on_the_grid_of_each_tensor() -> None:
    data = torch.randn(2 * CHUNK_FLOATS + 5)
    index = index_state({"x": data, "y": torch.zeros(0)}).index
    raw = data.numpy().tobytes()
    expected = tuple(digest(raw[start : start + CHUNK_BYTES]) for start in range(0, len(raw), CHUNK_BYTES))
    assert index.chunks == (expected, ())
    assert index.leaves == (leaf_digest(expected), leaf_digest(()))
    assert list(index.sizes.values()) == [CHUNK_BYTES, CHUNK_BYTES, 20]


# --- indices from peers ---


@QUICK
@given(STATES)
def test_an_index_comes_back_from_its_bytes(state: State) -> None:
    index = index_state(state).index
    back = StateIndex.unpack(index.pack(), len(index.skeleton))
    assert back == index
    assert back.digest == index.digest
    assert outline_tokens(index.outline(), len(index.skeleton)) == index.tokens()


@pytest.mark.parametrize("damage", ["shorter", "longer", "skeleton"])
def test_an_index_of_the_wrong_length_is_refused(damage: str) -> None:
    index = index_state({"a": torch.zeros(3), "b": torch.ones(2)}).index
    data, length = index.pack(), len(index.skeleton)
    data, length = {
        "shorter": (data[:-1], length),
        "longer": (data + bytes(32), length),
        "skeleton": (data, length - 1),
    }[damage]
    with pytest.raises(ProtocolError):
        StateIndex.unpack(data, length)
    with pytest.raises(ProtocolError):
        outline_tokens(index.outline()[:-32], len(index.skeleton))


def test_an_index_cannot_claim_chunks_that_it_does_not_list() -> None:
    skeleton = index_state({"a": torch.empty(0, dtype=torch.uint8)}).index.skeleton
    huge = skeleton.replace(b"\x93\xa1x\xa5uint8\x00", b"\x93\xa1x\xa5uint8\xcf" + (1 << 47).to_bytes(8, "big"))
    assert huge != skeleton
    with pytest.raises(ProtocolError, match="0 bytes of digests for 134217728 chunks"):
        StateIndex.unpack(huge, len(huge))


# --- assembly ---


@QUICK
@given(STATES, STATES)
def test_any_state_is_healed_to_any_other(state: State, target: State) -> None:
    heal(state, target)
    assert state_hash(state) == state_hash(target)


def test_a_model_and_its_optimizer_are_healed_through_their_state_dicts() -> None:
    target = training(seed=1, steps=3)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64))
    state: State = {"model": model.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "step": 0, "rng": b""}
    versions = [parameter._version for parameter in model.parameters()]
    _, created = heal(state, target)
    assert state_hash(state) == state_hash(target)
    assert state_hash({"m": dict(model.named_parameters())}) == state_hash({"m": dict(target["model"])})
    assert all(parameter._version > version for parameter, version in zip(model.parameters(), versions, strict=True))
    assert len(created) == 6 * 3


def test_only_what_differs_is_kept_and_written() -> None:
    target: State = {"x": torch.randn(5 * CHUNK_FLOATS)}
    state = clone(target)
    state["x"][2 * CHUNK_FLOATS] += 1
    before = state["x"]
    assembly = Assembly(index_state(target).index, index_state(state))
    lacking = [chunk for chunk in assembly.target.sizes if not assembly.holds(chunk)]
    assert lacking == [assembly.target.chunks[0][2]]
    assembly.put(lacking[0], rawbytes.read(target["x"])[2 * CHUNK_BYTES : 3 * CHUNK_BYTES])
    assert assembly.apply(state) == ()
    assert state["x"] is before
    assert torch.equal(state["x"], target["x"])
    assert sum(len(data) for data in assembly._store.values()) == CHUNK_BYTES


def test_content_found_under_other_keys_need_not_come() -> None:
    one, two, three = (torch.randn(CHUNK_FLOATS + 3) for _ in range(3))
    target: State = {"a": one, "b": two, "c": three, "d": [one.clone()]}
    state: State = {"a": two.clone(), "b": three.clone(), "c": one.clone(), "old": torch.ones(2)}
    source = index_state(target)
    assembly = Assembly(source.index, index_state(state))
    assert all(assembly.holds(chunk) for chunk in source.index.sizes)
    a = state["a"]
    assembly.apply(state)
    assert state_hash(state) == state_hash(target)
    assert state["a"] is a


def test_leaves_that_require_grad_and_views_are_filled_in_place() -> None:
    base = torch.zeros(4, 6)
    leaf = torch.zeros(3, requires_grad=True)
    state: State = {"view": base[1:3, ::2], "turned": base.t()[4:], "leaf": leaf}
    target: State = {"view": torch.randn(2, 3), "leaf": torch.randn(3), "turned": torch.randn(2, 4)}
    target["turned"][0, 1:3] = target["view"][:, 2]  # where the two views overlap
    view = state["view"]
    _, created = heal(state, target)
    assert created == ()
    assert state_hash(state) == state_hash(target)
    assert state["view"] is view
    assert torch.equal(base[1:3, ::2], target["view"])
    assert leaf.requires_grad
    assert torch.equal(leaf.detach(), target["leaf"])


def test_tied_weights_stay_tied_where_the_target_allows_it() -> None:
    weight = torch.zeros(5)
    state: State = {"embed": weight, "head": weight, "flat": [weight[:2]]}
    target: State = {"embed": torch.arange(5.0), "head": torch.arange(5.0), "flat": [torch.arange(2.0)]}
    _, created = heal(state, target)
    assert created == ()
    assert state["embed"] is state["head"] is weight
    assert state_hash(state) == state_hash(target)


@pytest.mark.parametrize("changed", ["embed", "head", "both"])
def test_tied_weights_are_parted_where_the_target_differs(changed: str) -> None:
    weight = torch.zeros(5)
    state: State = {"embed": weight, "head": weight}
    target: State = {"embed": torch.zeros(5), "head": torch.zeros(5)}
    for key, value in (("embed", 1.0), ("head", 2.0)):
        if changed in (key, "both"):
            target[key] += value
    _, created = heal(state, target)
    assert len(created) == 1
    assert state_hash(state) == state_hash(target)


def test_a_tensor_that_cannot_be_written_is_replaced() -> None:
    state: State = {"x": torch.ones(1).expand(4), "y": torch.ones(1).expand(4)}
    target: State = {"x": torch.arange(4.0), "y": torch.ones(4)}
    kept = state["y"]
    _, created = heal(state, target)
    assert created == (0,)
    assert state["y"] is kept
    assert state_hash(state) == state_hash(target)


def test_a_change_meanwhile_is_noticed() -> None:
    state: State = {"x": torch.zeros(2 * CHUNK_FLOATS)}
    target: State = {"x": torch.zeros(2 * CHUNK_FLOATS)}
    target["x"][0] = 1
    assembly = Assembly(index_state(target).index, index_state(state))
    for chunk in assembly.target.sizes:
        if not assembly.holds(chunk):
            assembly.put(chunk, rawbytes.read(target["x"])[:CHUNK_BYTES])
    state["x"][-1] = 5
    with pytest.raises(CorruptChunk, match=r"the tensor at 'x' .* leave the state alone"):
        assembly.apply(state)


def test_what_was_received_for_one_target_serves_the_next() -> None:
    state: State = {"x": torch.zeros(3)}
    shared, last = torch.randn(4), torch.randn(5)
    first = Assembly(index_state({"a": shared, "b": torch.ones(3)}).index, index_state(state))
    first.put(digest(rawbytes.read(shared)), rawbytes.read(shared))
    second = Assembly(index_state({"c": [shared], "d": last}).index, index_state(state))
    second.take_over(first)
    assert second.holds(digest(rawbytes.read(shared)))
    assert not second.holds(digest(rawbytes.read(last)))
    second.put(digest(rawbytes.read(last)), rawbytes.read(last))
    second.apply(state)
    assert state_hash(state) == state_hash({"c": [shared], "d": last})


def test_a_state_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"numpy\.ndarray at 'a/1'"):
        state_hash({"a": [1, np.zeros(2)]})
