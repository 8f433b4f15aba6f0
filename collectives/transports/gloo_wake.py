"""Wakes a thread that waits for one of gloo's point-to-point operations; used by `gloo` when an epoch is aborted.

Gloo tells every operation of a failed connection but the one whose bytes are half way: neither a timeout elsewhere, nor
the peer's death, nor the end of the group wakes who waits for that. PyTorch has a call that does (`RecvWork::abort` and
`SendWork::abort`, which end the wait with False), but does not show it to Python. It is called here through ctypes, on
the address that pybind11 gives out for such purposes, and only if the object is of the very class that it belongs to.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TYPE_INFO = b"St9type_info"
_WORK = b"N4c10d4WorkE"
_KINDS = ("Recv", "Send")
_VTABLE_HEADER = 2 * ctypes.sizeof(ctypes.c_void_p)


def can_wake() -> bool:
    """Whether this build of PyTorch has what `wake` needs; where it lacks it, waits must be bounded."""
    return _aborts() is not None


def wake(work: dist.Work) -> None:
    """End the wait for `work`, present or future, with False. Nothing happens where `can_wake` is false."""
    aborts = _aborts()
    if aborts is None:
        return
    address = aborts.address(work)
    table = ctypes.c_void_p.from_address(address).value
    if table in aborts.by_table:
        aborts.by_table[table](address)


class _Aborts:
    """The functions by the virtual table of the class that they belong to.

    Raises AttributeError, OSError or ValueError from the constructor where something is not there.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self.by_table: dict[int | None, Any] = {}
        for kind in _KINDS:
            name = f"N4c10d16ProcessGroupGloo8{kind}Work"
            function = library[f"_Z{name}5abortEv"]
            function.argtypes, function.restype = [ctypes.c_void_p], None
            self.by_table[_address(library, f"_ZTV{name}E") + _VTABLE_HEADER] = function
        # The type of what stands behind a bound function has the name of the compiler's ABI in its own.
        record = type(dist.Work.wait.__func__.__self__)  # type: ignore[attr-defined]
        self._abi = record.__name__.split("_v1_")[1].encode()
        new = ctypes.pythonapi.PyCapsule_New
        new.argtypes, new.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object
        self._type = new(_address(library, "_ZTI" + _WORK.decode()), _TYPE_INFO, None)
        self._pointer = ctypes.pythonapi.PyCapsule_GetPointer
        self._pointer.argtypes, self._pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p

    def address(self, work: Any) -> int:
        """Where the C++ object is."""
        capsule = work._pybind11_conduit_v1_(self._abi, self._type, b"raw_pointer_ephemeral")
        return int(self._pointer(capsule, _WORK))


def _address(library: ctypes.CDLL, symbol: str) -> int:
    return ctypes.addressof(ctypes.c_char.in_dll(library, symbol))


@cache
def _aborts() -> _Aborts | None:
    try:
        return _Aborts()
    except (AttributeError, IndexError, OSError, ValueError):
        return None
