"""Reading pickles of other people's checkpoints without executing anything.

A pickle names functions and classes to call. Here a name is looked up in a table of stand-ins that only record what
they were given; a name that is not in it is refused, and nothing is ever imported. Enumerations, namespaces and
settings of the training libraries become `Opaque` records, so that a checkpoint reads without the library that wrote
it.
"""

import base64
import collections
import pickle
import re
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np

from checkpoint.dtypes import TORCH
from collectives.errors import CorruptFile, RingholdError

JSON_NODES = 200_000
"""Values of one pickle that are turned into JSON at most: references let a small pickle stand for a huge value."""


class UnknownPickle(RingholdError):
    """A pickle names a function or class that Ringhold does not know; nothing of it was executed."""

    exit_code = 4


class Dtype(str):
    """A torch dtype, by its name in `checkpoint.dtypes`."""


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A torch storage that the pickle refers to by key; its bytes are beside the pickle."""

    key: str
    dtype: str | None
    size: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A torch tensor: `shape` elements of a storage from `offset` on, `strides` elements apart."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Opaque:
    """An object of a class that is not imported: what it was made from."""

    module = ""
    qualname = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Opaque":  # noqa: D102
        made = super().__new__(cls)
        made.args, made.kwargs, made.state = args, kwargs, {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(self.state, dict):
            self.state = {}
        self.state[key] = value

    def append(self, value: Any) -> None:
        """Take an element: list-like classes are filled by it."""
        self.args = (*self.args, value)

    def extend(self, values: Any) -> None:
        """Take elements."""
        self.args = (*self.args, *values)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the object that was pickled."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    @property
    def value(self) -> Any:
        """Return what an enumeration's member was made from, or the first argument."""
        return self.args[0] if self.args else None

    def __repr__(self) -> str:
        return f"<{self.module}.{self.qualname}>"


class Array(Opaque):
    """A numpy array, by its state: version, shape, dtype, order, bytes."""

    def numbers(self) -> "np.ndarray[Any, Any]":
        """Return it as a numpy array. `CorruptFile`: it is none of numbers."""
        try:
            _, shape, dtype, fortran, data = self.state
            kind = dtype.args[0] if isinstance(dtype, Opaque) else ""
            order = dtype.state[1] if isinstance(dtype.state, tuple) and dtype.state[1] in "<>" else "<"
            found = np.frombuffer(data, np.dtype(order + str(kind)))
            return found.reshape(shape, order="F" if fortran else "C")
        except (ValueError, TypeError, IndexError, AttributeError):
            raise CorruptFile("a numpy array in a pickle is malformed") from None


def _kind(module: str, name: str, base: type[Opaque] = Opaque) -> type[Opaque]:
    return type(name, (base,), {"module": module, "qualname": name})


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise CorruptFile("a tensor in a pickle has no storage")
    return _checked(storage, offset, shape, strides, storage.dtype or "U8")


def _tensor_typed(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    """`_rebuild_tensor_v3`: requires_grad, hooks, dtype."""
    dtype = next((value for value in rest if isinstance(value, Dtype)), None)
    if not isinstance(storage, StorageRef) or dtype is None:
        raise CorruptFile("a tensor in a pickle has no storage or dtype")
    return _checked(storage, offset, shape, strides, str(dtype))


def _checked(storage: StorageRef, offset: Any, shape: Any, strides: Any, dtype: str) -> TensorRef:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise CorruptFile(f"a tensor in a pickle has shape {shape}, strides {strides} and offset {offset}")
    return TensorRef(storage, offset, tuple(shape), tuple(strides), dtype)


def _of_type(function: Any, _type: Any, arguments: Any, state: Any = None) -> Any:
    """`_rebuild_from_type_v2`: a tensor of a subclass or with attributes."""
    if function not in (_tensor, _tensor_typed, _parameter):
        raise CorruptFile("a tensor in a pickle is made in an unknown way")
    return function(*arguments)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8", "latin-1"):
        raise CorruptFile("bytes in a pickle are malformed")
    return text.encode(encoding)


def _shape(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _number(dtype: Any, data: Any) -> Any:
    """A numpy scalar."""
    made = Array()
    made.state = (1, (1,), dtype, False, data)
    return made.numbers()[0].item()


def _path(*parts: Any) -> str:
    return "/".join(str(part) for part in parts)


def _default_dict(*_factory: Any) -> dict[Any, Any]:
    return {}


def _object(kind: Any, *_rest: Any) -> Any:
    """`copyreg._reconstructor`: an object without state."""
    if not (isinstance(kind, type) and issubclass(kind, Opaque)):
        raise CorruptFile("an object in a pickle is of no known class")
    return kind()


_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Names of modules as protocols 0 to 2 write them, which torch uses."""

_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_typed,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Size"): _shape,
    ("copyreg", "_reconstructor"): _object,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _default_dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "slice"): slice,
    ("_codecs", "encode"): _encode,
    ("pathlib", "Path"): _path,
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "PurePosixPath"): _path,
}

_STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "U8",
}  # fmt: skip

_RECORDS = {
    "argparse": {"Namespace"},
    "signal": {"Signals"},
    "types": {"SimpleNamespace"},
    "builtins": {
        "list",
        "dict",
        "tuple",
        "int",
        "float",
        "str",
        "bool",
        "bytes",
        "type",
        "NoneType",
        "object",
        "range",
    },
    "datetime": {"datetime", "timedelta", "date"},
    "torch": {"device", "strided", "Tensor", "Generator", "contiguous_format", "preserve_format", "memory_format"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.distributed.device_mesh": {"DeviceMesh", "_MeshLayout"},
    "numpy": {"dtype", "ndarray"},
}
"""Classes whose objects become records."""

_LIBRARIES = ("deepspeed", "megatron", "transformer_engine", "transformers.trainer_utils", "omegaconf")
"""Libraries whose classes become records, whichever they are: settings, enumerations, loss scalers. Never imported."""

_TORCH_FOLDERS = ("torch.distributed.checkpoint.", "torch.distributed.tensor.", "torch.optim.")


class _Restricted(pickle.Unpickler):
    """Looks names up in the tables above."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(BytesIO(data))
        self.where = where
        self.kinds: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self.kinds:
            self.kinds[key] = self._find(module, name)
        return self.kinds[key]

    def _find(self, module: str, name: str) -> Any:
        module = _PYTHON_2.get(module, module)
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module == "torch" and name in TORCH:
            return Dtype(TORCH[name])
        if module in ("torch", "torch.storage", "torch.cuda") and name in (*_STORAGES, "TypedStorage"):
            return _kind(module, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return _number if name == "scalar" else _kind(module, name, Array)
        if name in _RECORDS.get(module, ()) or _known_library(module):
            return _kind(module, name)
        raise UnknownPickle(
            f"{self.where}: the pickle names {module}.{name}, which no checkpoint needs that Ringhold reads; nothing "
            f"was executed. If you trust the file, save the checkpoint again without this object"
        )

    def persistent_load(self, pid: Any) -> StorageRef:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[4], int):
            raise CorruptFile(f"{self.where}: a tensor refers to its bytes in an unknown way")
        kind = getattr(pid[1], "qualname", "")
        return StorageRef(str(pid[2]), _STORAGES.get(kind), pid[4])


def _known_library(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in _LIBRARIES) or module.startswith(
        _TORCH_FOLDERS
    )


def loads(data: bytes, where: str) -> Any:
    """Read a pickle; `where` names it in errors.

    Raises:
        UnknownPickle: it names what is not known.
        CorruptFile: it is no whole pickle.

    """
    _refuse_huge_memo(data, where)
    try:
        return _Restricted(data, where).load()
    except RingholdError:
        raise
    except (MemoryError, RecursionError):
        raise CorruptFile(f"{where}: the pickle is nested or sized beyond what a checkpoint needs") from None
    except Exception as error:  # a damaged pickle fails in any way at all, inside stand-ins that take what comes
        raise CorruptFile(f"{where}: not a whole pickle ({type(error).__name__}: {error})") from None


_PLAIN = rb"[(012NQRabd}el\]ost)u\x81\x85-\x89\x8f-\x94\x97\x98]|[Khq\x80\x82].|[M\x83]..|[Jj\x84].{4}|[G\x95].{8}"
"""Opcodes with arguments of a fixed length, but for the one that numbers a value in the memo (`r`)."""
_COUNTED = {ord("U"): 1, ord("C"): 1, 0x8A: 1, 0x8C: 1, ord("T"): 4, ord("X"): 4, ord("B"): 4, 0x8B: 4, 0x8D: 8, 0x8E: 8, 0x96: 8}  # fmt: skip # noqa: E501
"""Opcodes whose argument begins with its length, of so many bytes."""
_LINES = {**dict.fromkeys(b"FILSVPgp", 1), **dict.fromkeys(b"ci", 2)}
"""Opcodes whose arguments are lines."""


def _refuse_huge_memo(data: bytes, where: str) -> None:
    """Refuse a pickle that numbers a value beyond its own length: the table of these would fill the memory.

    Walks the opcodes, runs of those of a fixed length at once: a pickle of megabytes takes a fraction of a second.
    What is no opcode is left to the unpickler to refuse.
    """
    run, at, end = _run(len(data)), 0, len(data)
    while True:
        match = run.match(data, at)
        at = match.end() if match else at
        if at >= end or data[at] == ord("."):
            return
        code = data[at]
        if code in _COUNTED:
            start = at + 1 + _COUNTED[code]
            at = start + int.from_bytes(data[at + 1 : start], "little")
        elif code in _LINES:
            start = at + 1
            for _ in range(_LINES[code]):
                at = data.find(b"\n", at) + 1
                if not at:
                    return
            if code == ord("p") and data[start : at - 1].strip().isdigit() and int(data[start : at - 1]) > end:
                raise _huge(data[start : at - 1].decode(), where)
        elif code == ord("r"):
            raise _huge(str(int.from_bytes(data[at + 1 : at + 5], "little")), where)
        else:
            return


@cache
def _runs(high: bytes) -> re.Pattern[bytes]:
    return re.compile(rb"(?:" + _PLAIN + rb"|r" + high + rb")*+", re.DOTALL)


def _run(length: int) -> re.Pattern[bytes]:
    """Opcodes of a fixed length, numbers of the memo up to about `length` among them."""
    if length < 1 << 24:
        return _runs(b"..[\x00-\\x%02x]\x00" % (length >> 16))
    return _runs(b"...[\x00-\\x%02x]" % min(255, length >> 24))


def _huge(number: str, where: str) -> CorruptFile:
    return CorruptFile(f"{where}: the pickle asks for a table of {number} values; it is damaged or an attack")


@dataclass
class _Json:
    """Turns values into JSON, and tells of those that have no such form."""

    left_out: list[str] = field(default_factory=list)
    nodes: int = 0

    def of(self, value: Any, path: str) -> Any:
        self.nodes += 1
        if self.nodes > JSON_NODES:
            raise CorruptFile(f"{path}: more than {JSON_NODES} values; the pickle is damaged or an attack")
        if value is None or isinstance(value, bool | int | str):
            return str(value) if isinstance(value, Dtype) else value
        if isinstance(value, float):
            return value
        if isinstance(value, bytes | bytearray):
            return {"base64": base64_of(value)}
        if isinstance(value, dict):
            return {str(key): self.of(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.of(item, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, Array):
            numbers = value.numbers()
            return {"dtype": str(numbers.dtype), "shape": list(numbers.shape), "base64": base64_of(numbers.tobytes())}
        if isinstance(value, Opaque):
            if isinstance(value.state, dict) and value.state:
                return self.of(value.state, path)
            if len(value.args) == 1 and isinstance(value.args[0], int | float | str):
                return value.args[0]
        self.left_out.append(path)
        return None


def to_json(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """Turn what `loads` returned into JSON values, and the paths of what has no such form (tensors among them)."""
    made = _Json()
    return made.of(value, path), made.left_out


def base64_of(data: bytes | bytearray) -> str:
    """Return bytes as text."""
    return base64.b64encode(data).decode()
