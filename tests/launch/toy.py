"""A stand-in for a peer and for a coordinator that speaks the pipe protocol and does nothing else.

Usage: toy.py peer STEPS PAUSE [MISDEED], toy.py coordinator --listen HOST:PORT [--new]
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launch.child import Link


def meet(shut_out: bool) -> None:
    """Wait for the other founders, as a group of peers does. `shut_out`: whoever comes later waits for ever."""
    folder, count = Path(os.environ["TOY_MEETING"]), int(os.environ["TOY_FOUNDERS"])
    folder.mkdir(exist_ok=True)
    if shut_out and len(list(folder.iterdir())) >= count:
        time.sleep(60)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.01)


def peer(steps: int, pause: float, misdeed: str) -> int:
    link = Link.enter()
    started, leaving, dying = (threading.Event() for _ in range(3))
    gates: set[int] = set()
    opened = threading.Condition()

    def on_command(command: dict[str, Any]) -> None:
        with opened:
            if command["do"] == "go":
                gates.difference_update(range(command["step"] + 1))
            gates.update(command.get("gates", ()))
            opened.notify_all()
        if command["do"] != "go":
            {"start": started, "leave": leaving, "die": dying}[command["do"]].set()

    woken = threading.Event()
    signal.signal(signal.SIGCONT, lambda number, frame: woken.set())
    if misdeed == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link.listen(on_command)
    link.report("ready")
    started.wait()
    meet(shut_out=misdeed == "shut-out")
    member = os.getpid()
    link.report("joined", member=member, epoch=1, size=1)
    print("the toy began", flush=True)
    for step in range(1, steps + 1):
        time.sleep(pause)
        if woken.is_set():  # we were stopped: evicted, and back as a new member
            woken.clear()
            member += 1_000_000
            link.report("joined", member=member, epoch=2, size=1)
        link.report("progress", step=step, loss=1.0 / step, member=member)
        with opened:
            assert opened.wait_for(lambda: step not in gates, 10), "a gate stayed closed"  # noqa: B023
        if dying.is_set():
            link.report("fired", where=f"staged of all_reduce {step}")
            os.kill(os.getpid(), signal.SIGKILL)
        if leaving.is_set():
            link.report("left")
            return 0
        if step == 2 and misdeed == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and misdeed == "error":
            print("the toy broke", flush=True)
            link.report("error", error="UsageError", message="no such file", exit_code=2)
            return 2
    link.report("done", hash="same")
    return 0


def coordinator(address: str) -> int:
    link = Link.enter()
    link.listen(lambda command: None)
    if address.endswith(":1"):
        link.report("error", error="UsageError", message="port 1 is in use", exit_code=2)
        return 2
    link.report("listening", address=address.replace(":0", ":4711"))
    while True:
        time.sleep(60)


if __name__ == "__main__":
    if sys.argv[1] == "peer":
        sys.exit(peer(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else ""))
    sys.exit(coordinator(sys.argv[3]))
