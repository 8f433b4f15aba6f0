"""Saving while training goes on: the state is copied, and a thread saves the copy.

    handle = save_async("runs/mine", state, layouts, comm, step=120)   # returns when the state may change again
    ...
    handle.wait()                                                      # the report, or the error

There is one such save at a time in a process: a later one waits for the one before it, and raises what that one ended
with if nobody has seen it yet. The copy's memory is kept and used again.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import torch
from torch import Tensor

from checkpoint import nest
from checkpoint.crew import Crew, crew_of
from checkpoint.holdings import Layouts
from checkpoint.saving import SaveOptions, SaveReport, Saving
from checkpoint.store import Store
from collectives.communicator import Communicator
from collectives.errors import OperationTimeout

LANE = "checkpoint background"


class SaveHandle:
    """A save under way; `save_async` returns it."""

    def __init__(self, future: "Future[SaveReport]") -> None:
        self._future = future
        self._seen = False

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> SaveReport:
        """Wait up to `timeout` seconds (None: until it ends) and return the report.

        Raises:
            OperationTimeout: not done in time; it goes on, wait again.
            RingholdError: the save failed, see `save`.

        """
        try:
            report = self._future.result(timeout)
        except FutureTimeout:
            if not self._future.done():
                raise OperationTimeout(f"the save is not done after {timeout} s; it goes on, wait again") from None
            raise
        finally:
            self._seen |= self._future.done()
        return report

    def settle(self) -> None:
        """Wait for the end; raises its error if nobody has seen it yet."""
        if not self._seen:
            self.wait()


def save_async(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    layouts: Layouts = None,
    comm: Communicator | None = None,
    *,
    step: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    options: SaveOptions | None = None,
) -> SaveHandle:
    """Copy the state and save the copy in the background. Every rank calls it, in the same order; arguments as `save`.

    Returns when the copy is made, if need be after the end of the save before it. Until this one has ended, collectives
    run in a lane of its own: wait for it before `admit`, which needs every lane idle.

    Raises:
        RingholdError: the save before this one failed and nobody has waited for it; this one was not begun.

    """
    return _background.save(path, state, layouts, crew_of(comm, LANE), step, metadata, options or SaveOptions())


class _Background:
    """The thread, the copy and the last handle of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._last: SaveHandle | None = None
        self._copies: dict[str, Tensor] = {}

    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        layouts: Layouts,
        crew: Crew,
        step: int | None,
        metadata: Mapping[str, Any] | None,
        options: SaveOptions,
    ) -> SaveHandle:
        with self._lock:
            last, self._last = self._last, None
            if last is not None:
                last.settle()
            used: dict[str, Tensor] = {}
            copied = self._copy(dict(state), (), used)
            self._copies = used

            def work() -> SaveReport:
                with Store(path) as store:
                    return Saving(store, crew, options).run(copied, layouts, step, dict(metadata or {}))

            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "ringhold-save")
            self._last = SaveHandle(self._pool.submit(work))
            return self._last

    def _copy(self, node: Any, path: nest.Path, used: dict[str, Tensor]) -> Any:
        """The nest with copies of its tensors; what else it holds cannot change or is refused by `save`."""
        if isinstance(node, Tensor):
            key = nest.key_of(path)
            used[key] = copy = self._copy_tensor(node.detach(), self._copies.get(key))
            return copy
        if isinstance(node, dict):
            return {key: self._copy(item, (*path, key), used) for key, item in node.items()}
        if type(node) in (list, tuple):
            return type(node)(self._copy(item, (*path, index), used) for index, item in enumerate(node))
        return node

    def _copy_tensor(self, tensor: Tensor, old: Tensor | None) -> Tensor:
        """A copy, in the memory of an earlier one where that fits."""
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = torch.empty(tensor.shape, dtype=tensor.dtype)
        return old.copy_(tensor)


_background = _Background()
