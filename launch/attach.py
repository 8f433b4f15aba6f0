"""Looking into a running job from outside: what its coordinator knows of every member. Used by `ringhold doctor`.

The one who asks is no peer: it proves the run's token, asks one question, and changes nothing.
"""

import asyncio

from collectives.errors import CoordinatorUnreachable, ProtocolError
from collectives.membership.protocol import Inspect, Status, decode_from_coordinator
from collectives.membership.wire import HANDSHAKE_SECONDS, client_tls, connect
from collectives.options import Options


def status(
    host: str, port: int, token: bytes, run: str, options: Options, timeout: float = HANDSHAKE_SECONDS
) -> Status:
    """Return what the coordinator at `host`:`port` knows of its run: the epoch, and each member's lanes.

    Waits at most `timeout` seconds.

    Raises:
        CoordinatorUnreachable: nobody answers there in time.
        JoinRefused: wrong token, or a coordinator of another run.

    """
    try:
        return asyncio.run(asyncio.wait_for(_ask(host, port, token, run, options), timeout))
    except (OSError, TimeoutError, ProtocolError, asyncio.IncompleteReadError) as error:
        reason = str(error) or "no answer in time"
        if isinstance(error, asyncio.IncompleteReadError):
            reason = "it hung up at once" + ("" if options.tls_ca else "; if it speaks TLS, set RINGHOLD_TLS_CA")
        raise CoordinatorUnreachable(f"no coordinator at {host}:{port}: {reason}; is the address right?") from None


async def _ask(host: str, port: int, token: bytes, run: str, options: Options) -> Status:
    channel = await connect(host, port, token, run, client_tls(options))
    try:
        channel.send(Inspect())
        while True:
            message = decode_from_coordinator(await channel.receive())
            if isinstance(message, Status):
                return message
    finally:
        channel.close()
