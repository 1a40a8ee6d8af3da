"""The Celery application as Flower sees it; the image's command is `celery --app=tasks flower`."""

from shared.broker import celery_app
from shared.settings import load_settings

app = celery_app(load_settings().redis_url.get_secret_value())
