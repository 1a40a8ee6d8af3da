"""What kombu does with messages that came to this worker and were not taken up when it closes a
channel: it puts them back, and an error in that ends the worker and all that it transcribes."""

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import redis

log = logging.getLogger(__name__)


class Bells(redis.QoS):
    """Puts them back where that is possible."""

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """A channel whose connection was lost twice has no address any more (kombu 5.7), and there
        are other ways to fail. No harm is done: a bell that is missing is rung by a reaper."""
        try:
            super().restore_unacked_once(stderr)  # type: ignore[no-untyped-call]
        except Exception as exc:
            log.warning("bells not put back: %r", exc, extra={"action": "bells_lost"})


def install() -> None:
    """For all connections that this process makes from here on."""
    redis.Channel.QoS = Bells
