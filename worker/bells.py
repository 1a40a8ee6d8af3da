"""What kombu keeps of the messages that came to this worker and were not taken up yet."""

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import redis

log = logging.getLogger(__name__)


class Bells(redis.QoS):  # type: ignore[misc]
    """Puts them back when a channel closes, where Redis is there to take them."""

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """kombu 5.7 fails in many ways when the connection was lost, and an error here ends the
        whole worker. What is missing a reaper rings again."""
        try:
            super().restore_unacked_once(stderr)
        except Exception as exc:
            log.info("bells were lost", extra={"action": "bells_lost", "error": repr(exc)})


def install() -> None:
    """For all connections of this process that are made from here on."""
    redis.Channel.QoS = Bells
