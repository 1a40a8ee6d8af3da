"""GET /jobs/{job_id}/webhook and POST .../redeliver: how a job's webhook was told of its end."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.access import audit, caller_of
from api.dependencies import state_of
from api.errors import answers
from api.status import job_id_of
from shared.errors import JobNotFound, ResultNotReady, StoreUnavailable, WebhookNotFound
from shared.schemas import JobWebhook

router = APIRouter(tags=["webhooks"])


@router.get(
    "/jobs/{job_id}/webhook",
    response_model=JobWebhook,
    summary="See whether a webhook was told",
    responses=answers(JobNotFound, WebhookNotFound, StoreUnavailable),
)
async def webhook(job_id: str, request: Request, response: Response) -> JobWebhook:
    """Every attempt, and when the next one is."""
    response.headers["Cache-Control"] = "no-store"
    deliveries = state_of(request).deliveries
    return await deliveries.read(job_id_of(job_id), caller_of(request).sees)


@router.post(
    "/jobs/{job_id}/webhook/redeliver",
    status_code=202,
    response_model=JobWebhook,
    summary="Tell a webhook again",
    responses=answers(JobNotFound, WebhookNotFound, ResultNotReady, StoreUnavailable),
)
async def redeliver(job_id: str, request: Request) -> JobWebhook:
    """Sends the same event again, under the same `webhook-id`, with as many tries as at first."""
    deliveries, sees = state_of(request).deliveries, caller_of(request).sees
    job_id = job_id_of(job_id)
    await deliveries.redeliver(job_id, sees)
    audit(request, "webhook_redelivered", job_id)
    return await deliveries.read(job_id, sees)
