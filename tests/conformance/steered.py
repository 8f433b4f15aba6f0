"""Programs that are steered from the test: what they do while the coordinator is away, and how peers come and go."""

import os
import signal
import time
from typing import Any
from unittest import mock

from collectives import faults
from collectives.errors import Evicted, RingholdError
from collectives.membership.member import Member
from collectives.membership.protocol import VERSION, FromPeer
from collectives.membership.session import Event
from tests.conformance.losses import dying
from tests.conformance.silences import reduce_rightly
from tests.harness.peer import Peer


def steered(peer: Peer, **options: Any) -> None:
    """Join, then do what the test says until it says leave: reduce, admit, or prepare to die."""
    try:
        comm = peer.join(**options)
    except RingholdError as error:
        peer.say("refused", error=type(error).__name__, message=str(error))
        return
    peer.say("joined", rank=comm.rank, member=comm.member_id, founder=comm.founder, epoch=comm.epoch)
    if not comm.founder:
        comm.sync({})
    while True:
        word = peer.hear("do")
        began = time.monotonic()
        facts: dict[str, Any] = {}
        try:
            match word["what"]:
                case "leave":
                    comm.leave()
                    return
                case "die at":
                    faults.arm(word["point"], dying(peer))
                case "die on":
                    comm.on_event(_deadly(peer, word["event_name"]))
                case "admit":
                    while not (changed := comm.admit()) and word["until"]:
                        time.sleep(0.005)
                    facts["changed"] = changed
                    if changed:
                        comm.sync({})
                case "reduce":
                    for number in range(word["times"]):
                        facts["contributors"] = reduce_rightly(comm, number, 3000, word.get("lane", "main"))
        except RingholdError as error:
            peer.say("done", error=type(error).__name__, message=str(error), seconds=time.monotonic() - began)
            comm.close()
            return
        peer.say("done", **facts, members=comm.members, epoch=comm.epoch, seconds=time.monotonic() - began)


def _deadly(peer: Peer, name: str) -> Any:
    def observe(event: Event) -> None:
        if event["event"] == name:
            peer.say("fired", where=name)
            os.kill(os.getpid(), signal.SIGKILL)

    return observe


def dies_joining(peer: Peer, event_name: str) -> None:
    """Join, and die when the membership says so."""
    peer.events = _Deadly(peer, event_name)
    peer.join()
    raise AssertionError("it was to die")


class _Deadly(list[Event]):
    def __init__(self, peer: Peer, name: str) -> None:
        super().__init__()
        self._observe = _deadly(peer, name)

    def append(self, event: Event) -> None:
        self._observe(event)


def tries(peer: Peer, version: int = 0, **how: Any) -> dict[str, Any]:
    """Try to join, maybe with another version of the protocol; tell how it ended."""
    began = time.monotonic()
    said: dict[str, Any]
    try:
        with mock.patch("collectives.membership.wire.VERSION", version or VERSION):
            comm = peer.join(**how)
    except RingholdError as error:
        said = {"error": type(error).__name__, "message": str(error)}
    else:
        said = {"member": comm.member_id, "founder": comm.founder}
        comm.leave()
    return said | {"seconds": time.monotonic() - began}


def interrupted_admission(peer: Peer) -> dict[str, Any]:
    """Rank 0 is interrupted while the coordinator has yet to answer its `admit`."""
    comm = peer.join()
    peer.say("rank", rank=comm.rank)
    if comm.rank > 0 or not comm.founder:
        if comm.founder:
            founders = max(comm.members)
            peer.hear("go")
            # The loss alone may change the membership first: who waits gives up a coordinator that is silent for long,
            # and knocks again.
            while max(comm.members) == founders:
                comm.admit()
                time.sleep(0.005)
        comm.sync({})
        members = comm.members
        comm.leave()
        return {"members": members}
    original = Member.admit

    def admit(core: Member) -> list[FromPeer]:
        peer.say("admitting")
        peer.hear("go")
        return original(core)

    peer.hear("go")
    with mock.patch.object(Member, "admit", admit):
        try:
            while True:
                comm.admit()
        except KeyboardInterrupt:
            pass
    try:
        comm.barrier()
    except Evicted as error:
        return {"said": str(error)}
    raise AssertionError("it went on as a member")
