"""The Celery side of the service: names, configuration, and the doorbell message.

A message is a doorbell: it says "there is work", and which, as a hint for whoever watches. It
carries no work, so losing, repeating or reordering messages changes nothing but latency; the truth
is in the job store. Whoever enqueues pushes the bell itself, because Celery's own `apply_async`
blocks for about a millisecond; a test shows that a real worker consumes what is built here.
"""

from __future__ import annotations

import base64
import json
import uuid

from celery import Celery
from kombu.serialization import dumps

QUEUE_NAME = "transcriptions"  # also the Redis list that holds the messages
TASK_NAME = "transcribe"


def celery_app(redis_url: str, *, lease_seconds: int = 45) -> Celery:
    """The Celery application. The job store keeps state, so there is no result backend."""
    app = Celery("faster-whisper-api", broker=redis_url, backend=None, set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE_NAME,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_serializer="json",
        accept_content=["json"],
        # Acknowledged early: what makes work survive is the lease, not the message.
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,  # Flower
        worker_hijack_root_logger=False,
        worker_enable_remote_control=True,  # Flower
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A Redis whose disk is full refuses to write; that passes, and is no reason to end.
        broker_channel_error_retry=True,
        broker_transport_options={
            "visibility_timeout": lease_seconds,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "socket_timeout": 10,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "client_name": "whisper-worker",
        },
    )
    return app


def short(fingerprint: str) -> str:
    """How logs and Flower call a transcription: enough to find it, and no key to its text."""
    return fingerprint[:12]


def doorbell(app: Celery, hint: str) -> bytes:
    """A message for the list QUEUE_NAME, as kombu's Redis transport writes it.

    `hint`: the transcription that caused it (see `short`); Flower shows it as the argument.
    """
    task_id = str(uuid.uuid4())
    task = app.amqp.as_task_v2(task_id, TASK_NAME, args=(hint,), ignore_result=True)
    content_type, content_encoding, body = dumps(task.body, serializer="json")
    return json.dumps(
        {
            "body": base64.b64encode(body.encode() if isinstance(body, str) else body).decode(),
            "content-type": content_type,
            "content-encoding": content_encoding,
            "headers": task.headers,
            "properties": {
                **task.properties,
                "body_encoding": "base64",
                "delivery_info": {"exchange": "", "routing_key": QUEUE_NAME},
                "delivery_mode": 2,
                "delivery_tag": str(uuid.uuid4()),
                "priority": 0,
            },
        }
    ).encode()
