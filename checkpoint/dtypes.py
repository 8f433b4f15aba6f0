"""The dtypes of tensors in checkpoints, by the names that safetensors uses, without torch.

Stored bytes are little-endian. Numpy lacks bfloat16 and the 8-bit floats; their bytes are handled as unsigned integers.
"""

from collectives.errors import UsageError

ITEMSIZE: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
    "C128": 16,
}  # fmt: skip
"""Bytes of an element."""

NUMPY: dict[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<c8", "C128": "<c16",
}  # fmt: skip
"""The numpy dtype of those that numpy has."""

TORCH: dict[str, str] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64", "complex128": "C128",
}  # fmt: skip
"""Ours for torch's names (`torch.float32` without the module)."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Floats whose words are sign, exponent, mantissa: they are cast into each other, and their exponents compress."""


def itemsize(dtype: str) -> int:
    """Bytes of an element.

    Raises:
        UsageError: the dtype is unknown.

    """
    if dtype not in ITEMSIZE:
        raise UsageError(f"unknown dtype {dtype!r}; known are {', '.join(ITEMSIZE)}")
    return ITEMSIZE[dtype]
