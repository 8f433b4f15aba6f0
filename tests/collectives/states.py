"""States for tests: strategies for random ones, and a small model with its optimizer."""

import copy
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from collectives import rawbytes

State = dict[Any, Any]

QUICK = settings(deadline=None, derandomize=True)

KEYS = st.one_of(st.integers(-3, 1 << 65), st.text(max_size=4))
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 127, 128, -128, -129]),
    st.floats(),
    st.text(max_size=6),
    st.binary(max_size=6),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any dtype and few elements, of random bits, not always contiguous."""
    dtype = rawbytes.DTYPES[draw(st.sampled_from(sorted(rawbytes.DTYPES)))]
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape)) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=count, max_size=count)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    made = (torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)).reshape(shape)
    return made.transpose(0, -1).contiguous().transpose(0, -1) if draw(st.booleans()) and len(shape) > 1 else made


def nests(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(KEYS, inner, max_size=3),
        ),
        max_leaves=8,
    )


STATES: st.SearchStrategy[State] = st.dictionaries(KEYS, nests(st.one_of(PLAIN, tensors())), max_size=4)


def training(seed: int, width: int = 64, steps: int = 1) -> State:
    """A model and its Adam, after `steps` steps on seeded data: str and int keys, 0-d and shared tensors."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, width))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().sum().backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps, "rng": b"\x01\x02"}


def clone(state: State) -> State:
    """The same bits in other memory."""
    return copy.deepcopy(state)
