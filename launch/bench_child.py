"""The main of a rank that `ringhold bench` started itself, `python -m launch.bench_child`; see `bench_host.alone`."""

import queue
import sys
from typing import Any

from collectives.errors import RingholdError
from launch.bench_request import Request
from launch.child import Link


def main() -> int:
    """Wait for the order to start, measure, and return the exit code."""
    link = Link.enter()  # first of all: from here on this process ends with its parent
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    link.listen(orders.put)
    from launch.bench_rank import Place, Rank  # imports torch, which takes seconds

    def tell(message: dict[str, Any]) -> None:
        link.report(message.pop("type"), **message)

    order = orders.get()
    try:
        with Rank(Request.from_json(order["request"]), Place(**order["place"]), tell) as rank:
            rank.measure()
    except RingholdError as error:
        link.report("error", error=type(error).__name__, message=str(error), exit_code=error.exit_code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
