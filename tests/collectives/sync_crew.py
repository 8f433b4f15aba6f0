"""Real processes for sync tests: a coordinator and members, forked for each scenario off one process with torch in it.

As a module: `SyncCrew`, used by tests. As a script: that process; it takes scenarios, one JSON line each, and answers
with what each member returned. What the members do stands in `sync_scenarios`.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKEN = "sync-tests"
PATIENCE = 40.0


class SyncCrew:
    """The process that scenarios are forked off."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.collectives.sync_crew"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )

    def play(self, scenario: str, members: int, founders: int) -> list[Any]:
        """What each member's part of the scenario returned; None for one that was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"scenario": scenario, "members": members, "founders": founders})
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE + 10)
        assert ready, f"scenario {scenario} did not end"
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, list)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(PATIENCE)


def _fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work` in a child, with the end of a pipe to write to; its pid and the other end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            work(writing)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    return pid, reading


def _play(scenario: str, members: int, founders: int, folder: Path) -> list[Any]:
    from collectives.membership.server import run_coordinator
    from collectives.options import Options
    from tests.collectives import sync_scenarios

    options = {"founders": founders, "heartbeat": 0.1, "heartbeat_timeout": 2.0, "op_timeout": 20.0}

    def coordinate(pipe: int) -> None:
        run_coordinator(
            "127.0.0.1",
            0,
            folder / "journal",
            run=scenario,
            token=TOKEN.encode(),
            options=Options.resolve(options),
            new=True,
            ready=lambda port: (os.write(pipe, str(port).encode()), None)[1],
        )

    def take_part(number: int) -> Callable[[int], None]:
        def work(pipe: int) -> None:
            part = sync_scenarios.Part(number, founders, f"127.0.0.1:{port}", scenario, TOKEN, options, folder)
            os.write(pipe, json.dumps(getattr(sync_scenarios, scenario)(part)).encode())

        return work

    coordinator, pipe = _fork(coordinate)
    port = int(os.read(pipe, 100))
    children = [_fork(take_part(number)) for number in range(members)]
    results = _collect([reading for _, reading in children], time.monotonic() + PATIENCE)
    for pid in (*(pid for pid, _ in children), coordinator):
        os.kill(pid, signal.SIGKILL)  # not yet waited for, so the pid is theirs
        os.waitpid(pid, 0)
    for descriptor in (pipe, *(reading for _, reading in children)):
        os.close(descriptor)
    return results


def _collect(pipes: list[int], deadline: float) -> list[Any]:
    """What comes out of each pipe until it is closed."""
    data = dict.fromkeys(pipes, b"")
    waiting = set(pipes)
    while waiting and time.monotonic() < deadline:
        for pipe in select.select(list(waiting), [], [], 0.1)[0]:
            more = os.read(pipe, 1 << 16)
            data[pipe] += more
            if not more:
                waiting.discard(pipe)
    return [json.loads(data[pipe]) if data[pipe] else None for pipe in pipes]


def _main() -> None:
    import torch

    import tests.collectives.sync_scenarios  # noqa: F401 - here and not in every child
    from tests.collectives.states import training

    torch.set_num_threads(1)
    training(seed=0)  # what torch imports at the first use would stop a member's heart for a second
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            result = _play(**json.loads(line), folder=Path(folder))
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
