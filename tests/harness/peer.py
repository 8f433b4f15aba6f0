"""The inside of a test process: runs one program and reports to the test. See `cluster` for the outside.

A program is a function at the top of a module, `def program(peer: Peer, **given) -> value`; what is given and what it
returns is JSON. It runs in the main thread of a process of its own.
"""

import importlib
import json
import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from collectives.communicator import Communicator
from collectives.membership.session import Event
from collectives.state import state_hash

PATIENCE = 60.0
"""Seconds that anything in a test may take before the test fails: generous, for a busy machine."""


class Peer:
    """What a program gets: how to join, and a line to the test.

    Attributes:
        name: of this process.
        setting: "address" of the coordinator, "run", "token", "transport" and "options" of the cluster.
        events: what the communicator told its observers so far.
        finalize: end as a script does, by way of the interpreter's own end, instead of at once.

    """

    def __init__(self, name: str, setting: dict[str, Any], line: socket.socket) -> None:
        self.name = name
        self.setting = setting
        self.events: list[Event] = []
        self.finalize = False
        self._line = line
        self._lock = threading.Lock()
        self._unread = b""
        self._heard: list[dict[str, Any]] = []

    def join(self, *, run: str = "", token: str = "", transport: str = "", **options: Any) -> Communicator:
        """Join the cluster's run, with its options and these, unless another run, token or transport is given."""
        setting = self.setting
        return Communicator.join(
            coordinator=setting["address"],
            run=run or setting["run"],
            token=token or setting["token"],
            transport=transport or setting["transport"],
            options={**setting["options"], **options},
            on_event=self.events.append,
        )

    def say(self, event: str, **data: Any) -> None:
        """Tell the test; it gets it by `Process.expect(event)`. From any thread."""
        with self._lock:
            self._line.sendall(json.dumps({"event": event, **data}).encode() + b"\n")

    def hear(self, word: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait until the test says `Process.tell(word, ...)`; returns what came with it."""
        deadline = time.monotonic() + timeout
        while True:
            for message in self._heard:
                if message["word"] == word:
                    self._heard.remove(message)
                    return message
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._line], [], [], left)[0]:
                raise TimeoutError(f"the test did not say {word!r} in {timeout} s")
            data = self._line.recv(1 << 16)
            if not data:
                os._exit(1)
            *lines, self._unread = (self._unread + data).split(b"\n")
            self._heard += [json.loads(line) for line in lines]

    def await_event(self, event: str, timeout: float = PATIENCE) -> Event:
        """Wait until the communicator's observers were told of `event`; returns the first one."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for one in list(self.events):
                if one["event"] == event:
                    return one
            time.sleep(0.005)
        raise TimeoutError(f"no event {event!r} in {timeout} s, but {[e['event'] for e in self.events]}")


class _Defects(logging.Handler):
    """Collects what must never happen: errors that are logged and threads that end by an exception."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def hook(self, args: Any) -> None:
        text = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        self.texts.append(f"thread {args.thread.name if args.thread else '?'}: {text}")


def serve(
    program: str,
    name: str,
    setting: dict[str, Any],
    given: dict[str, Any],
    line: socket.socket,
    finalize: bool = False,
) -> NoReturn:
    """Run a program, report how it ended, and end this process; `finalize` is where `Peer.finalize` begins."""
    defects = _Defects()
    logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(threadName)s %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger().addHandler(defects)
    threading.excepthook = defects.hook
    peer = Peer(name, setting, line)
    peer.finalize = finalize
    ending: dict[str, Any] = {}
    try:
        ending["value"] = resolve(program)(peer, **given)
    except BaseException as error:
        traceback.print_exc()
        ending["error"] = type(error).__name__
        ending["message"] = str(error)
        ending["details"] = {key: value for key, value in vars(error).items() if _plain(value)}
    peer.say("ended", **ending, defects=defects.texts)
    sys.stderr.flush()
    if peer.finalize:
        line.close()
        sys.exit(0)
    os._exit(0)


def _plain(value: object) -> bool:
    return isinstance(value, int | str | float | tuple)


def resolve(reference: str) -> Callable[..., Any]:
    """Return the function that MODULE:NAME refers to."""
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def bits(tensor: torch.Tensor) -> str:
    """The bits of a tensor, as a digest: equal exactly if dtype, shape and bits are."""
    return state_hash({"bits": tensor.detach()})
