"""A member that dies soon after the run began is missed at once, however long nobody was there before."""

from collectives.membership.coordinator import Coordinator, Send
from collectives.membership.protocol import NONCE_BYTES, Join, Prepare, Report
from collectives.options import Options


def test_a_closed_connection_is_a_loss_right_after_the_founding() -> None:
    nonce = bytes(NONCE_BYTES)
    coordinator = Coordinator("run", Options(founders=2), [], 0.0, lambda secret: secret, lambda: nonce)
    for tick in range(200):
        assert coordinator.on_tick(tick * 0.05) == []
    for connection in (1, 2):
        coordinator.on_message(connection, Join(bytes([connection]) * NONCE_BYTES, "127.0.0.1", 1, "gloo"), 10.0)
    for connection in (1, 2):
        coordinator.on_message(connection, Report(1, {}), 10.1)
    assert coordinator.members == (1, 2)
    actions = coordinator.on_closed(2, 10.2)
    assert Prepare(2, [1]) in [action.message for action in actions if isinstance(action, Send)]
