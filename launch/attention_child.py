"""The main of a rank that `ringhold attention` started itself, `python -m launch.attention_child`."""

import queue
import sys
from typing import Any

from collectives.errors import RingholdError
from launch.attention_request import AttentionRequest
from launch.child import Link


def main() -> int:
    """Wait for the order to start, measure, and return the exit code."""
    link = Link.enter()  # first of all: from here on this process ends with its parent
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    link.listen(orders.put)
    from launch.attention_rank import measure  # imports torch, which takes seconds
    from launch.bench_rank import Place

    def tell(message: dict[str, Any]) -> None:
        link.report(message.pop("type"), **message)

    order = orders.get()
    place = Place(**order["place"])
    try:
        wrong = measure(AttentionRequest.from_json(order["request"]), place, tell)
    except RingholdError as error:
        link.report("error", error=type(error).__name__, message=str(error), exit_code=error.exit_code)
        return error.exit_code
    if not place.rank:
        link.report("done", wrong=wrong)
    return 0


if __name__ == "__main__":
    sys.exit(main())
