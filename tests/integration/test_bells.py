"""A worker's messages when its connection to the broker is closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kombu import Consumer, Message
from kombu.transport import redis

from shared.broker import QUEUE_NAME, celery_app, doorbell
from worker import bells


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis.Channel, "QoS", redis.Channel.QoS)
    bells.install()


@pytest.fixture
def taken(settings, raw) -> Iterator[Message]:
    """A bell of two, not acknowledged yet."""
    app = celery_app(settings.redis_url.get_secret_value())
    raw.lpush(QUEUE_NAME, doorbell(app, "one"), doorbell(app, "two"))
    with app.connection_for_read() as connection:
        channel, taken = connection.channel(), []
        queues = [app.amqp.queues[QUEUE_NAME]]
        with Consumer(channel, queues, callbacks=[lambda _, bell: taken.append(bell)]):
            connection.drain_events(timeout=5)
            assert len(taken) == raw.llen(QUEUE_NAME) == 1
            yield taken[0]


@pytest.fixture
def channel(taken: Message) -> redis.Channel:
    return taken.channel


def test_a_bell_that_was_not_taken_up_is_put_back(channel, raw):
    channel.close()
    assert raw.llen(QUEUE_NAME) == 2


def test_a_channel_that_has_lost_its_connection_closes(channel, raw):
    """As Celery leaves it when Redis goes away while it reconnects."""
    channel.connection.client = None
    channel.close()
    assert channel.closed
    assert raw.llen(QUEUE_NAME) == 1


def test_a_bell_is_acknowledged_once_and_for_all(taken, channel, raw):
    taken.ack()
    channel.close()
    assert raw.llen(QUEUE_NAME) == 1


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_bell_that_is_acknowledged_too_late_does_no_harm(taken, channel, is_closed):
    """Between the ring and the answer its channel had lost its connection."""
    channel.connection.client = None
    if is_closed:
        channel.close()
    taken.ack()
    channel.close()
