"""Reading the memory of another process on this host, without its doing: process_vm_readv(2), by ctypes.

Used by the shared-memory transport. It only ever reads; nothing here can change a peer's memory.
"""

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)
_Pair = ctypes.c_uint64 * 4
"""Two struct iovec: address, length, address, length."""

WORD_BYTES = 32
"""Length of an owner's word."""

_Word = ctypes.c_char * WORD_BYTES


class RemoteMemory:
    """The memory of process `pid`, whose owner's word (see `read`) is at address `word` and holds `expected`."""

    def __init__(self, pid: int, word: int, expected: bytes) -> None:
        self._pid = pid
        self._word = word
        self._expected = expected
        self._read = _libc.process_vm_readv
        self._read.restype = ctypes.c_ssize_t
        self._read.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_void_p,
            ctypes.c_ulong,
            ctypes.c_ulong,
        )

    def read(self, address: int, into: int, count: int) -> bool:
        """Copy `count` bytes from the process' `address` to our address `into`, and behind them its owner's word.

        The word is read last: the owner changes it before its memory gets another use, and a process that was given
        the number of a dead one does not have it. So True means that the bytes are what was meant (rule R10).

        Raises:
            ProcessLookupError: the process is gone.
            PermissionError: this system does not let us read it.

        """
        seen = _Word()
        here = _Pair(into, count, ctypes.addressof(seen), WORD_BYTES)
        there = _Pair(address, count, self._word, WORD_BYTES)
        done = self._read(self._pid, ctypes.addressof(here), 2, ctypes.addressof(there), 2, 0)
        if done == count + WORD_BYTES:
            return seen.raw == self._expected
        if done < 0:
            code = ctypes.get_errno()
            if code in (errno.ESRCH, errno.EPERM):
                raise OSError(code, os.strerror(code))  # which makes the right subclass
        return False

    def may_read(self) -> bool:
        """Whether the system lets us read this process, and it is the one that was meant."""
        try:
            return self.read(self._word, 0, 0)
        except OSError:
            return False
