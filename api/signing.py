"""Signatures of webhooks, as Standard Webhooks has them (standardwebhooks.com), and their secrets.

One secret signs for the whole service: WEBHOOK_SECRET, or else one that is made at the first start
and kept in DATA_DIR, which all API processes share. With AUTH=keys each name has a secret that
follows from it, so that nobody can sign for another.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from shared.errors import InvalidSettings
from shared.settings import Settings, parse_webhook_secret

FILE = "webhook_secret"  # in DATA_DIR
KEY_BYTES = 32


@dataclass(frozen=True, repr=False)
class Signer:
    """`keys`: the current one, and the one before it while receivers change to the current."""

    keys: tuple[bytes, ...]

    def signature(self, owner: str, webhook_id: str, timestamp: int, body: bytes) -> str:
        """The header `webhook-signature`. `owner`: the job's; '' for one that has none."""
        signed = f"{webhook_id}.{timestamp}.".encode() + body
        digests = [_hmac(_key_of(owner, key), signed) for key in self.keys]
        return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)

    def secret_of(self, owner: str) -> str:
        """What that owner verifies with."""
        return written(_key_of(owner, self.keys[0]))


def signer(settings: Settings) -> Signer:
    """Makes the secret where there is none. Raises InvalidSettings."""
    current = settings.webhook_secret.get_secret_value()
    old = settings.webhook_secret_old.get_secret_value()
    key = parse_webhook_secret(current) if current else _kept(settings.data_dir / FILE)
    return Signer((key, parse_webhook_secret(old)) if old else (key,))


def new_secret() -> str:
    return written(secrets.token_bytes(KEY_BYTES))


def written(key: bytes) -> str:
    return f"whsec_{base64.b64encode(key).decode()}"


def _kept(path: Path) -> bytes:
    """The key in this file, made by whoever comes first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            if not text:
                text = new_secret()
                file.write(f"{text}\n")
                file.flush()
                os.fsync(file.fileno())
        return parse_webhook_secret(text)
    except (OSError, ValueError) as exc:
        raise InvalidSettings(
            f"The secret of webhooks can't be kept in {path} ({exc}). Set WEBHOOK_SECRET."
        ) from exc


def _key_of(owner: str, key: bytes) -> bytes:
    return _hmac(key, f"webhooks of {owner}".encode()) if owner else key


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.new(key, text, hashlib.sha256).digest()
