"""What kombu does with messages of a channel that it closes: it puts those back that were not taken
up, and acknowledges others later. An error in that ends the worker and all that it transcribes."""

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import redis

log = logging.getLogger(__name__)


class Bells(redis.QoS):
    """Does so where that is possible."""

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """A channel whose connection was lost twice has no address any more (kombu 5.7), and there
        are other ways to fail. No harm is done: a bell that is missing is rung by a reaper."""
        try:
            super().restore_unacked_once(stderr)  # type: ignore[no-untyped-call]
        except Exception as exc:
            log.warning("bells not put back: %r", exc, extra={"action": "bells_lost"})

    def ack(self, delivery_tag: str) -> None:
        """Not on a channel that is closed, or has lost its connection: its bells are put back, and
        heard again at most."""
        connection = self.channel.connection
        if connection is not None and connection.client is not None:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]


def install() -> None:
    """For all connections that this process makes from here on."""
    redis.Channel.QoS = Bells
