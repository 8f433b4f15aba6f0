"""Log entries of a run as sentences for people. Used by `launch.display`."""

import signal
from typing import Any

from launch import units
from launch.record import Entry

_FAULTS = {
    "kill": "told {peer} to die in the middle of an all-reduce",
    "stop": "stopped {peer} (SIGSTOP)",
    "join": "let {peer} join",
    "leave": "asked {peer} to leave",
    "coordinator": "killed the coordinator (SIGKILL)",
}


class Narrator:
    """Turns entries, in order, into sentences; what several peers say alike is told once."""

    def __init__(self) -> None:
        self._epoch = 0
        self._evaluated_at = self._saved_at = 0
        self._carried_in = self._reloaded_in = 0
        self._members: dict[int, str] = {}

    def tell(self, entry: Entry) -> str | None:
        """Return what is worth telling about an entry, or None."""
        source = entry["source"]
        match entry["type"]:
            case "listening":
                return f"the coordinator listens on {entry['address']}"
            case "fault":
                return f"step {entry['step']}: " + _FAULTS[entry["what"]].format(peer=entry["peer"])
            case "fired":
                return f"{source} kills itself in {entry['where']}"
            case "woken":
                return f"woke {entry['peer']} (SIGCONT)"
            case "joined":
                self._members[entry["member"]] = source
                return f"{source} is member {entry['member']} of epoch {entry['epoch']}"
            case "late":
                return f"{source} came when the run was over"
            case "left":
                return f"{source} left"
            case "eval":
                return self._evaluated(entry)
            case "checkpoint":
                return self._saved(entry)
            case "carried":
                return self._carried(entry)
            case "reloaded":
                return self._reloaded(entry)
            case "event":
                return self._event(entry)
            case "error":
                return f"{source}: {entry['error']}: {entry['message']}"
            case "exit" if entry["code"] != 0:
                return f"{source} ended {ending(entry['code'])}"
            case "signal":
                return f"ending everything ({signal.Signals(entry['number']).name})"
            case "timeout":
                return str(entry["detail"])
        return None

    def _evaluated(self, entry: Entry) -> str | None:
        if entry["step"] <= self._evaluated_at:
            return None
        self._evaluated_at = entry["step"]
        return f"step {entry['step']}: loss on held-out text {entry['loss']:.4f}"

    def _saved(self, entry: Entry) -> str | None:
        if entry["step"] <= self._saved_at:
            return None
        self._saved_at = entry["step"]
        return f"step {entry['step']}: saved {units.size(entry['bytes'])} to {entry['url']}"

    def _carried(self, entry: Entry) -> str | None:
        """Where the state of a planned run came from after a loss."""
        if entry["epoch"] <= self._carried_in:
            return None
        self._carried_in = entry["epoch"]
        copies = entry["copies"]
        whence = f", {copies} of them from second copies of what was lost" if copies else ""
        return f"step {entry['step']}: {entry['tensors']} tensors of state come from the survivors' memory{whence}"

    def _reloaded(self, entry: Entry) -> str | None:
        """Where the state of a planned run came from, when nobody who is left had all of it."""
        if entry["epoch"] <= self._reloaded_in:
            return None
        self._reloaded_in = entry["epoch"]
        return (
            f"step {entry['was']}: {entry['lost']} tensors of state are lost with who held them; all go on from the "
            f"checkpoint of step {entry['step']} in {entry['url']}"
        )

    def _event(self, entry: Entry) -> str | None:
        if entry["event"] == "evicted":
            return f"{entry['source']} learns that it was evicted"
        if entry["event"] != "epoch" or entry["epoch"] <= self._epoch:
            return None
        self._epoch = entry["epoch"]
        parts = [f"epoch {self._epoch}: {len(entry['members'])} members"]
        parts += [f"{word} {self._names(entry[word])}" for word in ("lost", "joined") if entry[word]]
        return ", ".join(parts)

    def _names(self, members: list[Any]) -> str:
        return " ".join(self._members.get(member, f"member {member}") for member in members)


def ending(code: int) -> str:
    """Say how a process ended."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
